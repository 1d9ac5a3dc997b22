"""What all ways of sharing work between draws have in common."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

Stacks = dict[str, Tensor]
"""Draws by slot name, (S, r, k) for A and (S, d, r) for B."""


@dataclass(frozen=True)
class Chunk:
    """Some of the draws, which run in one pass.

    Args:
        start: the place of the first one among all that are asked for.
        stacks: their weights.
    """

    start: int
    stacks: Stacks

    @property
    def size(self) -> int:
        """How many draws."""
        return len(next(iter(self.stacks.values())))


class Sharing(Protocol):
    """Computes once what several draws, or several batches under one draw, would compute alike."""

    def computing(self, chunk: Chunk) -> AbstractContextManager[nn.Module]:
        """A context that puts the draws in their slots; yields what the scorer is to call."""
        ...
