"""Which sequences of a batch make one row, so that they share their draw in training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayestune.errors import Refusal

RowOf = Sequence[int] | Tensor | Callable[[int], Sequence[int]]


class Rows(NamedTuple):
    """N rows: equal runs of consecutive sequences, or as `row_of` (S,) says of each sequence."""

    num_rows: int
    row_of: Tensor | None = None

    def of(self, sequences: int) -> Tensor:
        """The row of each of so many sequences, (S,)."""
        if self.row_of is not None:
            return self.row_of
        return torch.arange(sequences) // (sequences // self.num_rows)


@dataclass(frozen=True)
class RowGroups:
    """How the sequences of a batch make rows.

    Args:
        size: so many consecutive sequences are one row.
        row_of: instead of a size: the number of each sequence's row, from 0, or a function of the
            number of sequences that gives these.

    Raises:
        Refusal: if both or none of them is given, or the size is not a positive integer.
    """

    size: int | None = None
    row_of: RowOf | None = None

    def __post_init__(self) -> None:
        if (self.size is None) == (self.row_of is None):
            raise Refusal(
                f"rows are given by a size or by row_of: got size={self.size!r} and "
                f"row_of={self.row_of!r}, expected one of them; leave the other out"
            )
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise Refusal(
                f"the sequences of a row are counted from 1: got {self.size!r}, expected a "
                "positive integer; 1 makes each sequence a row"
            )

    def rows(self, sequences: int) -> Rows:
        """The rows of a batch of so many sequences.

        Raises:
            Refusal: if the sequences do not divide into rows, or `row_of` does not fit them.
        """
        if self.size is None:
            return self._numbered(sequences)
        count, rest = divmod(sequences, self.size)
        if rest:
            raise Refusal(
                f"the batch does not divide into rows: got {sequences} sequences, expected a "
                f"multiple of {self.size} (sequences a row); call group_rows with the batch's size"
            )
        return Rows(count)

    def _numbered(self, sequences: int) -> Rows:
        numbers = self.row_of(sequences) if callable(self.row_of) else self.row_of
        row_of = torch.as_tensor(numbers)
        is_integer = not (row_of.is_floating_point() or row_of.dtype is torch.bool)
        if row_of.shape != (sequences,) or not is_integer or row_of.min() < 0:
            raise Refusal(
                f"row_of does not fit the batch: got {numbers}, expected the number of a row, from "
                f"0, for each of the {sequences} sequences; a function of their number fits every "
                "batch"
            )
        return Rows(int(row_of.max()) + 1, row_of.long())
