"""Questions → token batches → class logits (N, C): by the answer's token, its text's likelihood, or a model's head."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bayestune.lora import base_of, group_rows, is_classifier
from bayestune.questions import Question, Scoring
from bayestune.tasks import Task
from bayestune.tokens import Encoder, answer_tokens, left_padded, positions, right_padded, token_ids

Layout = Literal["packed", "expanded"]
Encoded = dict[str, Any]


def _with_labels(batch: dict[str, Tensor], rows: Sequence[Encoded]) -> dict[str, Tensor]:
    if all(row["answer"] is not None for row in rows):
        batch["labels"] = torch.tensor([row["answer"] for row in rows])
    return batch


def last_logits(model: nn.Module, inputs: Mapping[str, Any], keep: int) -> Tensor:
    """The logits (B, keep, V) of the last `keep` positions, and no others where the model can leave them out."""
    inner: Any = base_of(model.module if hasattr(model, "module") else model)  # type: ignore[arg-type]
    accepted = inspect.signature(inner.forward).parameters  # type: ignore[arg-type]
    optional = {"position_ids": inputs["position_ids"], "logits_to_keep": keep, "use_cache": False}
    optional = {name: value for name, value in optional.items() if name in accepted}
    with _contiguous_input(inner.get_output_embeddings()):  # type: ignore[operator]
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **optional)
    return output.logits[:, -keep:]


@contextmanager
def _contiguous_input(head: nn.Module | None) -> Iterator[None]:
    """Copies the few positions that reach the head: as a slice, torch's CPU product would copy the head's weight."""
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


@dataclass
class LetterScorer(Encoder):
    """Class logits are the logits of the answers' tokens at the last position; missing options have -inf.

    Args:
        tokenizer: the model's.
        task: gives prompts and labels.
        max_length: tokens of a prompt; a longer one loses the end of its passage.
    """

    @cached_property
    def tokens(self) -> list[int]:
        """The labels' token ids, found on a prompt of the task."""
        rows = (*self.task.train, *self.task.held_out, *self.task.evaluation)
        widest = max(rows, key=lambda row: len(row.options))
        prompt = self.task.prompt.render(widest, "letter")
        return answer_tokens(self.tokenizer, prompt[-40:], self.task.prompt.answers(widest, "letter"))

    def encode(self, rows: Sequence[Question]) -> list[Encoded]:
        """Token ids, number of options and answer of each row."""
        encoded, truncated = [], 0
        for row in rows:
            self.task.prompt.answers(row, "letter")
            ids, cut = self.prompt_ids(row, "letter")
            truncated += cut
            encoded.append({"ids": ids, "options": len(row.options), "answer": row.answer, "length": len(ids)})
        self.warn_of(truncated, len(rows))
        return encoded

    def collate(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """A left-padded batch."""
        counts = torch.tensor([row["options"] for row in rows])
        mask = left_padded([[1] * len(row["ids"]) for row in rows], 0)
        batch = {
            "input_ids": left_padded([row["ids"] for row in rows], self.pad),
            "attention_mask": mask,
            "position_ids": positions(mask),
            "option_mask": torch.arange(int(counts.max())) < counts[:, None],
        }
        return _with_labels(batch, rows)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Class logits (N, C)."""
        group_rows(model, 1)
        logits, mask = last_logits(model, batch, keep=1)[:, -1], batch["option_mask"]
        tokens = torch.tensor(self.tokens[: mask.shape[1]], device=logits.device)
        return logits[:, tokens].float().masked_fill(~mask, -torch.inf)


@dataclass
class TextScorer(Encoder):
    """Class logits are the mean log-likelihoods of the options' tokens after the question; -inf where none.

    All options of a question see the same draw. "packed" puts question and options in one sequence, where an option
    sees the question and itself only: the question is read once. "expanded" has a sequence for each option and works
    with any model; both give the same logits.

    Args:
        tokenizer: the model's.
        task: gives prompts and options.
        max_length: tokens of the question and one option.
        layout: "packed" needs full attention that takes a mask (sdpa or eager).
        bool_mask: whether the packed mask is of type bool (sdpa) or additive (eager).
    """

    layout: Layout = "packed"
    bool_mask: bool = True
    _warned: bool = field(default=False, init=False, repr=False)

    def encode(self, rows: Sequence[Question]) -> list[Encoded]:
        """Token ids of the question and of each option, and the answer."""
        encoded, truncated = [], 0
        for row in rows:
            texts = self.task.prompt.answers(row, "text")
            room = max(len(token_ids(self.tokenizer, " " + text)) for text in texts)
            ids, cut = self.prompt_ids(row, "text", room)
            options = [self._option_ids(ids, text) for text in texts]
            truncated += cut
            length = len(ids) + (sum if self.layout == "packed" else max)(map(len, options))
            encoded.append({"ids": ids, "options": options, "answer": row.answer, "length": length})
        self.warn_of(truncated, len(rows))
        return encoded

    def _option_ids(self, prompt: list[int], text: str) -> list[int]:
        """Tokens by which the option continues the prompt; on its own where the tokenizer would merge the two."""
        tail = prompt[-8:]
        end = str(self.tokenizer.decode(tail))
        start, whole = token_ids(self.tokenizer, end), token_ids(self.tokenizer, f"{end} {text}")
        if whole[: len(start)] == start and len(whole) > len(start):
            return whole[len(start) :]
        return token_ids(self.tokenizer, " " + text)

    def collate(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """A batch in the scorer's layout."""
        batch = self._packed(rows) if self.layout == "packed" else self._expanded(rows)
        counts = torch.tensor([len(row["options"]) for row in rows])
        batch["option_mask"] = torch.arange(int(counts.max())) < counts[:, None]
        return _with_labels(batch, rows)

    def _packed(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        question = left_padded([[1] * len(row["ids"]) for row in rows], 0).bool()
        option = right_padded([[c for c, ids in enumerate(r["options"]) for _ in ids] for r in rows], -1)
        place = right_padded([[i for ids in r["options"] for i in range(len(ids))] for r in rows], 0)
        targets = right_padded([[token for ids in r["options"] for token in ids] for r in rows], self.pad)
        ids = torch.cat([left_padded([row["ids"] for row in rows], self.pad), targets], 1)
        position_ids = torch.cat([positions(question.long()), question.sum(1, keepdim=True) + place], 1)
        block = torch.cat([torch.where(question, -2, -1), option], 1)  # -2 question, -1 padding, else the option
        sees = (block[:, :, None] == block[:, None, :]) | (block[:, None, :] == -2)
        allowed = sees & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        mask = allowed if self.bool_mask else torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
        source = torch.where(place == 0, 0, torch.arange(option.shape[1]))  # the kept position that predicts a token
        return {
            "input_ids": ids,
            "attention_mask": mask[:, None],
            "position_ids": position_ids,
            "targets": targets,
            "source": source,
            "option": option,
        }

    def _expanded(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        width = max(len(row["options"]) for row in rows)
        options = [(row["options"] + [row["options"][0]] * width)[:width] for row in rows]
        sequences = [row["ids"] + ids for row, group in zip(rows, options, strict=True) for ids in group]
        targets = left_padded([ids for group in options for ids in group], -1)
        mask = left_padded([[1] * len(ids) for ids in sequences], 0)
        return {
            "input_ids": left_padded(sequences, self.pad),
            "attention_mask": mask,
            "position_ids": positions(mask),
            "targets": targets,
        }

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Class logits (N, C)."""
        mask, targets = batch["option_mask"], batch["targets"]
        width = mask.shape[1]
        group_rows(model, 1 if self.layout == "packed" else width)
        logits = last_logits(model, batch, keep=targets.shape[1] + 1).float()
        if self.layout == "packed":
            source, option = batch["source"], batch["option"]
        else:
            source = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
            option = torch.where(targets < 0, -1, 0)
        row = torch.arange(targets.shape[0], device=targets.device)[:, None]
        likelihood = logits[row, source, targets.clamp_min(0)] - logits.logsumexp(-1).gather(1, source)
        member = option[..., None] == torch.arange(width if self.layout == "packed" else 1, device=option.device)
        means = (likelihood[..., None] * member).sum(1) / member.sum(1).clamp_min(1)
        return means.reshape(mask.shape).masked_fill(~mask, -torch.inf)


@dataclass
class HeadScorer(Encoder):
    """Class logits are those of a model's classification head; all rows have the same options, the head's classes.

    The text is the question, or the pair (context, question) where there is a context.

    Args:
        tokenizer: the model's.
        task: gives the questions.
        max_length: tokens of a text; of a longer pair the context loses its end.
    """

    def encode(self, rows: Sequence[Question]) -> list[Encoded]:
        """Token ids and answer of each row.

        Raises:
            ValueError: if a row's options are not those of the others.
        """
        options = next(iter((*self.task.train, *self.task.evaluation, *rows))).options
        if other := next((row for row in rows if row.options != options), None):
            raise ValueError(
                f"row {other.id}: got the options {list(other.options)}, expected {list(options)} in every row under "
                'scoring="head"; use scoring="letter" or "text"'
            )
        return [self._encoded(row) for row in rows]

    def _encoded(self, row: Question) -> Encoded:
        first, second = (row.context, row.question) if row.context else (row.question, None)
        cut = "only_first" if row.context else True
        ids = dict(self.tokenizer(first, second, truncation=cut, max_length=self.max_length))
        return {"inputs": ids, "answer": row.answer, "length": len(ids["input_ids"])}

    def collate(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """A batch padded as the tokenizer does."""
        batch = dict(self.tokenizer.pad([row["inputs"] for row in rows], return_tensors="pt"))
        return _with_labels(batch, rows)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Class logits (N, C)."""
        group_rows(model, 1)
        return model(**{name: value for name, value in batch.items() if name in _HEAD_INPUTS}).logits.float()


_HEAD_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def can_pack(model: nn.Module) -> bool:
    """Whether a model takes the packed layout: sdpa or eager attention over the full sequence in every layer."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    full = all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ["full_attention"])
    sliding = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    positions = "position_ids" in inspect.signature(model.forward).parameters
    # a recurrent layer and ALiBi go by a token's place in the sequence, whatever mask and positions say
    by_place = getattr(model, "_is_stateful", False) or getattr(config, "alibi", False)
    return config._attn_implementation in ("sdpa", "eager") and full and not sliding and positions and not by_place


Scorer = LetterScorer | TextScorer | HeadScorer


def make_scorer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    scoring: Scoring = "letter",
    max_length: int = 300,
    layout: Layout | None = None,
) -> Scorer:
    """The scorer of a task for a model and its tokenizer.

    Args:
        model: the base model, before LoRA.
        tokenizer: its tokenizer.
        task: the questions.
        scoring: "letter" or "text" for a language model, "head" for one with a classification head.
        max_length: tokens of a prompt.
        layout: of text scoring; None packs where the model can.

    Raises:
        ValueError: if `scoring` is unknown or not the model's, or an answer is not one token under "letter".
    """
    if scoring not in get_args(Scoring):
        raise ValueError(f"unknown scoring: got {scoring!r}, expected one of {get_args(Scoring)}")
    if is_classifier(model) != (scoring == "head"):
        raise ValueError(
            f"scoring {scoring!r} does not fit a {type(model).__name__}: expected 'head' for a model with a "
            "classification head and 'letter' or 'text' for a language model"
        )
    if scoring == "head":
        return HeadScorer(tokenizer, task, max_length)
    if scoring == "letter":
        scorer = LetterScorer(tokenizer, task, max_length)
        _ = scorer.tokens  # an answer that is not one token is refused now, not in the middle of a fit
        return scorer
    sdpa = model.config.get_text_config()._attn_implementation == "sdpa"  # type: ignore[union-attr, operator]
    return TextScorer(tokenizer, task, max_length, layout or ("packed" if can_pack(model) else "expanded"), sdpa)
