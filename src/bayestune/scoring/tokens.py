"""Prompts to token ids: the token that answers, the length limit, padding, and the last logits."""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bayestune.adapters import base_of
from bayestune.data import Question, Scoring, Task

logger = logging.getLogger(__name__)

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
        output = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **optional
        )
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


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answers: Sequence[str]
) -> list[int]:
    """The one token by which each answer really continues the prompt in this tokenizer.

    "Answer:" + " A" is one token " A" in byte-level BPE and "▁A" in SentencePiece; other tokenizers want "A". The form
    is found by tokenising prompt and answer together, not assumed.

    Args:
        tokenizer: the model's.
        prompt: a prompt, or its end.
        answers: the labels, such as A, B, C, D.

    Returns:
        A token id for each answer, all different.

    Raises:
        ValueError: if an answer is not one token in either form, or two share a token.
    """
    start = token_ids(tokenizer, prompt)
    for separator in (" ", ""):
        whole = [token_ids(tokenizer, prompt + separator + answer) for answer in answers]
        if all(len(ids) == len(start) + 1 and ids[:-1] == start for ids in whole):
            tokens = [ids[-1] for ids in whole]
            if len(set(tokens)) == len(tokens):
                return tokens
    pieces = {
        answer: tokenizer.convert_ids_to_tokens(token_ids(tokenizer, f"{prompt} {answer}")[-3:])
        for answer in answers
    }
    raise ValueError(
        f"an answer is not one token of its own after the prompt: the last tokens are {pieces}; "
        'use one-token labels or scoring="text"'
    )


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that open every text in this tokenizer, such as Llama's <s>."""
    plain, special = token_ids(tokenizer, "a"), list(tokenizer("a")["input_ids"])  # type: ignore[arg-type]
    place = next((i for i in range(len(special)) if special[i : i + len(plain)] == plain), 0)
    return special[:place]


@dataclass
class Encoder:
    """What both ways of scoring share: prompts to token ids, within the length limit."""

    tokenizer: PreTrainedTokenizerBase
    task: Task
    max_length: int = 300

    def prompt_ids(self, row: Question, scoring: Scoring, room: int = 0) -> tuple[list[int], bool]:
        """Token ids of the prompt with `room` tokens to spare, and whether the passage had to be shortened."""
        start, context = _start_ids(self.tokenizer), token_ids(self.tokenizer, row.context)
        limit, shortened, keep = self.max_length - room - len(start), row, len(context)
        while (
            len(ids := token_ids(self.tokenizer, self.task.prompt.render(shortened, scoring)))
            > limit
        ):
            if not keep:
                raise ValueError(
                    f"row {row.id}: the question and its options take more than max_length={self.max_length} tokens; "
                    "raise max_length"
                )
            keep = max(0, keep - (len(ids) - limit))
            text = str(self.tokenizer.decode(context[:keep], clean_up_tokenization_spaces=False))
            shortened = replace(
                row, context=text.rstrip("\ufffd")
            )  # the cut may go through a character
        return start + ids, shortened is not row

    def warn_of(self, truncated: int, total: int) -> None:
        """Says how many rows lost a part of their passage."""
        if truncated:
            logger.warning(
                "%d of %d rows were longer than %d tokens: their passage was shortened, question and options kept",
                truncated,
                total,
                self.max_length,
            )

    @property
    def pad(self) -> int:
        """The token that fills a batch up."""
        token = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id or 0) if token is None else int(token)  # type: ignore[arg-type]


def left_padded(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """Sequences of unlike length as one tensor, filled up on the left."""
    width = max(map(len, sequences))
    return torch.tensor([[value] * (width - len(ids)) + list(ids) for ids in sequences])


def right_padded(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """Sequences of unlike length as one tensor, filled up on the right."""
    width = max(map(len, sequences))
    return torch.tensor([list(ids) + [value] * (width - len(ids)) for ids in sequences])


def positions(mask: Tensor) -> Tensor:
    """Position ids that count from 0 at the first token of a left-padded mask."""
    return (mask.cumsum(-1) - 1).clamp_min(0)
