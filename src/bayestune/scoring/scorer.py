"""What a scorer is: rows → batches → class logits."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bayestune.data import Question, Task

logger = logging.getLogger(__name__)

Encoded = dict[str, Any]  # a row's tokens, "answer", "length", and whether it was "shortened"


@dataclass
class Scorer(ABC):
    """Makes batches of a task's questions, and class logits of a model's outputs on them.

    Args:
        tokenizer: the model's.
        task: the questions and their prompt.
        max_length: tokens of a row; a longer one loses the end of its passage, with a warning.
        warns: whether to log that warning.
    """

    tokenizer: PreTrainedTokenizerBase
    task: Task
    max_length: int = 300
    warns: bool = field(default=True, kw_only=True)
    when_shortened: ClassVar[str] = "their passage was shortened, question and options kept"

    def encode(self, rows: Sequence[Question]) -> list[Encoded]:
        """The tokens, length and answer of each row."""
        encoded = [{**self.encode_row(row), "answer": row.answer} for row in rows]
        count = sum(row["shortened"] for row in encoded)
        if count and self.warns:
            what = f"{count} of {len(rows)} rows were longer than {self.max_length} tokens"
            logger.warning("%s: %s", what, self.when_shortened)
        return encoded

    @abstractmethod
    def encode_row(self, row: Question) -> Encoded:
        """The tokens of one row, its length, and whether it had to be shortened."""

    def sequences(self, row: Encoded) -> int:
        """How many sequences of its length an encoded row puts into a batch."""
        return 1

    def collate(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """A padded batch, with labels (N,) if every row has an answer."""
        batch = self.pad_rows(rows)
        answers = [row["answer"] for row in rows]
        if None not in answers:
            batch["labels"] = torch.tensor(answers)
        return batch

    @abstractmethod
    def pad_rows(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """The rows' tokens, and all that `__call__` needs to know of them."""

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Class logits (N, C), -inf for options that a row does not have."""

    def answer_places(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Where the model answers: each row's sequence, and the position in it, (N,) each.

        By default a row is one sequence, padded on the left, and answers at its last position.
        """
        count, length = batch["input_ids"].shape
        return torch.arange(count), torch.full((count,), length - 1)

    @property
    def pad(self) -> int:
        """The id of the token that batches are padded with."""
        tokenizer: Any = self.tokenizer
        pad = tokenizer.pad_token_id
        return pad if pad is not None else tokenizer.eos_token_id or 0


def option_mask(counts: Sequence[int]) -> Tensor:
    """Which of C options (N, C) the rows have, from their numbers of options."""
    return torch.arange(max(counts)) < torch.tensor(counts)[:, None]
