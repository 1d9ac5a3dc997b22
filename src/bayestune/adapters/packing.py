"""Batches in which documents of several lengths follow each other: each sees a draw of its own."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

BLOCK = 64  # tokens; a block has a weight (r, k) of its own, and a document fills whole blocks


class Documents(NamedTuple):
    """Where the documents of a packed batch of N·T tokens lie, and blocks that hold one each.

    A document is read in blocks of `BLOCK` tokens, the last of which is filled up with a token that
    nobody reads back. So a layer's input is cut like any other batch, at the price of at most a
    block more for each document.
    """

    number: int  # D
    document: Tensor  # (B,), the document of each block
    source: Tensor  # (B·BLOCK,), the token at each place of the blocks
    place: Tensor  # (N·T,), the place of each token

    @classmethod
    def of(cls, positions: Tensor) -> Self | None:
        """The documents that positions (N, T) tell apart; None where each sequence is one.

        A document begins where a position does not follow the one before it, which is how
        transformers makes the mask of attention.

        Example:
            >>> Documents.of(torch.tensor([[0, 1, 2, 0, 1]])).place.tolist()
            [0, 1, 2, 64, 65]
        """
        begins = torch.ones_like(positions, dtype=torch.bool)
        begins[:, 1:] = positions.diff(dim=1) != 1
        starts = begins.flatten().nonzero().flatten()
        if len(starts) == len(positions):
            return None
        tokens = torch.arange(positions.numel(), device=positions.device)
        ends = torch.cat([starts[1:], tokens[-1:] + 1])
        blocks = (ends - starts + BLOCK - 1) // BLOCK
        number = torch.arange(len(starts), device=positions.device)
        document = number.repeat_interleave(blocks)
        # a document's first place, less its first token
        shift = (blocks.cumsum(0) - blocks) * BLOCK - starts
        place = tokens + shift.repeat_interleave(ends - starts)
        source = torch.zeros(len(document) * BLOCK, dtype=torch.long, device=positions.device)
        source[place] = tokens
        return cls(len(starts), document, source, place)

    def in_blocks(self, input: Tensor) -> Tensor:
        """A layer's input (N, T, k) or (N·T, k) in blocks (B, BLOCK, k)."""
        flat = input.reshape(-1, input.shape[-1])
        return flat.index_select(0, self.source).unflatten(0, (-1, BLOCK))

    def in_tokens(self, output: Tensor) -> Tensor:
        """A layer's output (B, BLOCK, r) token by token, (N·T, r)."""
        return output.flatten(0, 1).index_select(0, self.place)
