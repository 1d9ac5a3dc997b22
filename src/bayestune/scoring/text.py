"""Text scoring: a language model's likelihoods of the options' texts."""

import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayestune.adapters import base_of, evaluating, group_rows
from bayestune.data import Question, Task
from bayestune.errors import Refusal
from bayestune.forward import agrees, has_own_window, on_device, sizes_change
from bayestune.scoring.last_logits import last_logits
from bayestune.scoring.scorer import Encoded, Scorer, option_mask
from bayestune.scoring.tokens import (
    before_answer,
    left_padded,
    left_padded_inputs,
    prompt_ids,
    right_padded,
    token_ids,
    written_before_answer,
)

# What `_goes_by_mask` and `_packs_exactly` say of a model, kept for as long as it lives.
_GOES_BY_MASK: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_PACKS_EXACTLY: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
Layout = Literal["packed", "expanded"]

# What a position belongs to: the question, nothing, or the option of that number, from 0.
_QUESTION = -2
_PADDING = -1


def can_pack(model: nn.Module) -> bool:
    """Whether a model takes the packed layout: its tokens go by mask and position ids alone.

    Its settings must say so, and two options must have the same logits packed as expanded.
    """
    base = base_of(model)
    is_outline = next(base.parameters()).is_meta  # without weights there is nothing to try
    return _goes_by_mask(base) and (is_outline or _packs_exactly(base))


def _goes_by_mask(model: nn.Module) -> bool:
    """Whether a model's settings say that its tokens go by mask and position ids alone."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    has_window = getattr(config, "sliding_window", None) is not None
    slides = has_window and getattr(config, "use_sliding_window", True)
    # a recurrent layer and ALiBi go by a token's place in the sequence, not by its position id
    by_place = getattr(model, "_is_stateful", False) or getattr(config, "alibi", False)
    takes_mask = config._attn_implementation in ("sdpa", "eager")
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    sees_all = set(kinds) == {"full_attention"} and not slides and not has_own_window(config)
    return takes_mask and takes_positions and sees_all and not by_place


@dataclass
class TextScorer(Scorer):
    """Class logits are the mean log-likelihoods of the options' tokens after the question.

    All options of a question see the same draw. "packed" puts question and options in one sequence,
    where an option sees the question and itself only: the question is read once. "expanded" has a
    sequence for each option and works with any model. Both give the same logits.

    Args:
        layout: "packed" needs full attention that takes a mask (sdpa or eager).
        bool_mask: whether the packed mask is of type bool (sdpa) or additive (eager).
    """

    layout: Layout = "packed"
    bool_mask: bool = True

    def encode_row(self, row: Question) -> Encoded:
        """Token ids of the question and of each option."""
        texts = self.task.prompt.answers(row, "text")
        room = max(self._room(text) for text in texts)
        ids, shortened = prompt_ids(self, row, "text", room)
        options = [self._option_ids(ids, text) for text in texts]
        total = sum if self.layout == "packed" else max
        length = len(ids) + total(map(len, options))
        return {"ids": ids, "options": options, "length": length, "shortened": shortened}

    def sequences(self, row: Encoded) -> int:
        """One, or one for each option."""
        return len(row["options"]) if self.layout == "expanded" else 1

    def _room(self, text: str) -> int:
        """The most tokens that an option takes."""
        separators = ("", " ") if self.task.prompt.chat else (" ",)
        return max(len(token_ids(self.tokenizer, f"{before}{text}")) for before in separators)

    @cached_property
    def _written(self) -> str | None:
        """What the chat template writes before an answer, if known."""
        return written_before_answer(self.tokenizer, self.task.prompt, "text")

    def _option_ids(self, prompt: list[int], text: str) -> list[int]:
        """Tokens by which an option continues the prompt; on its own if the two would merge."""
        end = str(self.tokenizer.decode(prompt[-8:]))
        start = token_ids(self.tokenizer, end)
        continued = f"{before_answer(end, self._written)[0]}{text}"
        whole = token_ids(self.tokenizer, f"{end}{continued}")
        if whole[: len(start)] == start and len(whole) > len(start):
            return whole[len(start) :]
        return token_ids(self.tokenizer, continued)

    def pad_rows(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """A batch in the scorer's layout, the options' tokens in the last W positions.

        For each of these positions "targets" holds its token, "option" the number of its option,
        and "source" which of the last W + 1 positions predicts it.
        """
        batch = self._packed(rows) if self.layout == "packed" else self._expanded(rows)
        batch["option_mask"] = option_mask([len(row["options"]) for row in rows])
        return batch

    def _packed(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """One sequence a row: the question, padded on the left, then all its options."""
        tokens = []  # of a row's options, one after the other
        numbers = []  # of the option that each token belongs to
        places = []  # of each token within its option
        for row in rows:
            tokens.append(list(chain.from_iterable(row["options"])))
            sizes = list(map(len, row["options"]))
            numbers.append([number for number, size in enumerate(sizes) for _ in range(size)])
            places.append(list(chain.from_iterable(map(range, sizes))))
        targets = right_padded(tokens, self.pad)
        option = right_padded(numbers, _PADDING)
        place = right_padded(places, 0)
        question = left_padded_inputs([row["ids"] for row in rows], self.pad)
        mask = question["attention_mask"]
        block = torch.cat([torch.where(mask == 1, _QUESTION, _PADDING), option], 1)
        position = mask.sum(1, keepdim=True) + place  # each option begins where the question ends
        return {
            "input_ids": torch.cat([question["input_ids"], targets], 1),
            "attention_mask": self._packed_mask(block),
            "position_ids": torch.cat([question["position_ids"], position], 1),
            "targets": targets,
            "option": option,
            # an option's first token is predicted by the question's last, at 0 of those kept
            "source": torch.where(place == 0, 0, torch.arange(option.shape[1])),
        }

    def _packed_mask(self, block: Tensor) -> Tensor:
        """Which tokens each one sees (N, 1, T, T): the question and its own block, up to itself."""
        is_same_block = block[:, :, None] == block[:, None, :]
        is_question = block[:, None, :] == _QUESTION
        seen = (is_same_block | is_question).tril()[:, None]
        if self.bool_mask:
            return seen
        return torch.where(seen, 0.0, torch.finfo(torch.float32).min)

    def _expanded(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """A sequence for each option; rows with fewer options repeat their first one."""
        width = max(len(row["options"]) for row in rows)
        options = []
        sequences = []
        for row in rows:
            missing = width - len(row["options"])
            own = row["options"] + row["options"][:1] * missing
            options += own
            sequences += [row["ids"] + ids for ids in own]
        targets = left_padded(options, self.pad)
        option = left_padded([[0] * len(ids) for ids in options], _PADDING)
        source = torch.arange(targets.shape[1]).repeat(len(targets), 1)
        batch = left_padded_inputs(sequences, self.pad)
        return {**batch, "targets": targets, "option": option, "source": source}

    def answer_places(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The question's last token, in the sequence of the first option where each has one."""
        count = len(batch["option_mask"])
        sequences, length = batch["input_ids"].shape
        own = torch.arange(count) * (sequences // count)
        if self.layout == "packed":
            return own, torch.full((count,), length - batch["targets"].shape[1] - 1)
        return own, length - 1 - (batch["option"][own] != _PADDING).sum(1)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Class logits (N, C), -inf for options that a row does not have.

        Raises:
            Refusal: if the layout is "packed" and the model's tokens go by more than mask and
                position ids.
        """
        if self.layout == "packed":
            _refuse_packing(model)
        mask = batch["option_mask"]
        targets = batch["targets"]
        source = batch["source"]
        sequences = mask.shape[1] if self.layout == "expanded" else 1  # of a row
        group_rows(model, sequences)
        logits = last_logits(model, batch, keep=targets.shape[1] + 1).float()
        sequence = torch.arange(len(targets), device=targets.device)[:, None]
        likelihood = logits[sequence, source, targets] - logits.logsumexp(-1).gather(1, source)
        numbers = torch.arange(mask.shape[1] // sequences, device=targets.device)
        member = batch["option"][..., None] == numbers
        means = (likelihood[..., None] * member).sum(1) / member.sum(1).clamp_min(1)
        return means.reshape(mask.shape).masked_fill(~mask, -torch.inf)


def _refuse_packing(model: nn.Module) -> None:
    base = base_of(model)
    if base not in _GOES_BY_MASK:
        _GOES_BY_MASK[base] = not isinstance(base, PreTrainedModel) or _goes_by_mask(base)
    if not _GOES_BY_MASK[base]:
        raise Refusal(
            f'options cannot be packed for a {type(base).__name__}: got layout="packed", expected '
            "a model with full attention whose tokens go by mask and position ids; use "
            'layout="expanded"'
        )


def _packs_exactly(model: Any) -> bool:
    """Whether a question with two short options has the same logits packed as expanded.

    It is computed once for a model.
    """
    if model not in _PACKS_EXACTLY:
        config = model.config.get_text_config()
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.vocab_size, (13,), generator=generator).tolist()
        row = {"ids": tokens[:8], "options": [tokens[8:10], tokens[10:]]}
        tokenizer: Any = SimpleNamespace(pad_token_id=0)
        bool_mask = config._attn_implementation == "sdpa"
        task = Task("tried", (), ())
        packed = TextScorer(tokenizer, task, 300, "packed", bool_mask)
        expanded = TextScorer(tokenizer, task, 300, "expanded", bool_mask)
        with evaluating(model):
            logits = packed(model, on_device(packed.pad_rows([row]), model))
            batch = on_device(expanded.pad_rows([row]), model)
            expected = expanded(model, batch)
            by_size = sizes_change(partial(expanded, model), batch, expected)
            _PACKS_EXACTLY[model] = agrees(logits[None], expected, 0, model, by_size) is True
    return _PACKS_EXACTLY[model]
