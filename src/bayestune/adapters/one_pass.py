"""One training pass: its rows, its layers' noise, and how an input is put into blocks."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayestune.adapters.packing import Documents
from bayestune.adapters.row_groups import RowGroups, Rows


@dataclass(frozen=True)
class Sizes:
    """What the inputs of a model say of a pass: N rows in S sequences of T tokens, 0 if unknown.

    Positions (S, T) are given where a sequence may hold several documents. With `windows`
    rows are pictures, whose windows or frames a layer may see as its leading axis, (N·windows, …).
    """

    rows: int
    sequences: int
    tokens: int = 0
    positions: Tensor | None = None
    windows: bool = False

    def leads(self, input: Tensor) -> bool:
        """Whether an input (…, k) begins with the sequences, their tokens or their windows."""
        leading = len(input)
        if input.dim() == 2:
            return leading in (self.sequences, self.sequences * self.tokens)
        in_windows = self.windows and leading > 0 and leading % self.sequences == 0
        return leading == self.sequences or in_windows


class Call(NamedTuple):
    """A random layer's input in blocks that see one draw each, and the noise of all rows."""

    blocks: Tensor  # (B, t, k)
    which: Tensor | slice | None  # the row of each block; None where block n is row n
    noise: Any
    shape: torch.Size  # (…, k), the rows before the tokens
    time_first: bool
    documents: Documents | None = None  # where a block holds tokens of one of them

    def in_blocks(self, input: Tensor) -> Tensor:
        """Another input of the same shape as the call's, in the same blocks (B, t, k)."""
        if self.time_first:
            input = input.transpose(0, 1)
        if self.documents is not None:
            return self.documents.in_blocks(input)
        return input.reshape(self.blocks.shape)

    def of_blocks(self, per_row: Tensor) -> Tensor:
        """What the blocks take of a tensor (N, …): (B, …)."""
        return per_row if self.which is None else per_row[self.which]

    def shaped(self, output: Tensor) -> Tensor:
        """The blocks' output (B, t, r) as the layer's, (…, r)."""
        if self.documents is not None:
            output = self.documents.in_tokens(output)
        output = output.reshape(*self.shape[:-1], output.shape[-1])
        return output.transpose(0, 1) if self.time_first else output


class Pass:
    """One pass: its sizes, its rows, and the noise of the layers that it has called."""

    def __init__(self, sizes: Sizes | None, gradients: bool) -> None:
        self.sizes = sizes
        self.gradients = gradients
        self.at_mean = False
        self.rows: Rows | None = None  # settled by the first random layer that is called
        self.documents: Documents | None = None  # likewise
        self.noises: dict[Any, Any] = {}
        self.repeated: dict[Any, None] = {}  # the layers that were called again, an ordered set
        self.repeats: set[int] = set()  # the names of those later calls

    def settle(self, groups: RowGroups | None) -> Rows:
        """Sets the rows of the pass: as `groups` says, else each row, or document, by itself."""
        sizes = self.sizes or Sizes(1, 1)
        if sizes.positions is not None:
            self.documents = Documents.of(sizes.positions)
        if self.documents is not None:
            sequences = self.documents.number
            num_rows = sequences
        else:
            sequences = sizes.sequences
            num_rows = sizes.rows  # whose sequences follow each other, as options in (N, C, T) do
        self.rows = groups.rows(sequences) if groups else Rows(num_rows)
        return self.rows

    def documents_in(self, input: Tensor) -> Documents | None:
        """The documents, if the input (…, k) holds all tokens of the batch."""
        sizes = self.sizes or Sizes(1, 1)
        fits = input.shape[:-1].numel() == sizes.sequences * sizes.tokens
        return self.documents if fits else None

    def blocks(self, input: Tensor, rows: Rows) -> tuple[Tensor, Tensor | slice | None]:
        """The input (…, k), rows before tokens, as blocks (B, t, k), and the row of each block."""
        documents = self.documents_in(input)
        if documents is not None:
            row_of = rows.of(documents.number).to(input.device)
            return documents.in_blocks(input), row_of[documents.document]
        if self.documents is not None:
            return as_a_whole(input)
        leading = len(input)
        width = input.shape[-1]
        sizes = self.sizes or Sizes(leading, leading)
        if sizes.leads(input):
            if rows.row_of is None:
                return input.reshape(rows.num_rows, -1, width), None
            return input.reshape(sizes.sequences, -1, width), rows.row_of.to(input.device)
        if leading == rows.num_rows:
            return input.reshape(leading, -1, width), None
        return as_a_whole(input)


def as_a_whole(input: Tensor) -> tuple[Tensor, slice]:
    """An input that all rows share, such as positions, as one block that sees row 0's draw."""
    return input.reshape(1, -1, input.shape[-1]), slice(0, 1)
