"""Batches of rows of like length, in an order that seed and epoch alone determine."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

POOL = 50  # batches whose rows are sorted by length together


def by_length(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """The rows of one epoch in batches of like length, the batches in random order.

    The rows are dealt at random into pools of `POOL` batches, or of a quarter of the epoch if that
    is less; within a pool they are sorted and cut into batches. So the batches differ from epoch to
    epoch, and no length comes first. The rows left over, fewer than a batch, come last.

    Args:
        lengths: tokens of each row, (N,).
        batch_size: rows of a batch.
        seed: of the run.
        epoch: from 0; a resumed run goes on with the same rows.

    Returns:
        The rows' numbers, (N,).

    Example:
        >>> by_length([1, 9, 1, 9, 1, 9], batch_size=3, seed=0, epoch=0)
        [0, 4, 1, 2, 5, 3]
    """
    generator = torch.Generator().manual_seed((seed << 32) + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    num_batches = len(order) // batch_size
    in_batches = num_batches * batch_size
    pool = batch_size * max(1, min(POOL, len(order) // (4 * batch_size)))
    rows: list[int] = []
    for start in range(0, in_batches, pool):
        rows += sorted(order[start : min(start + pool, in_batches)], key=lengths.__getitem__)
    shuffled: list[int] = []
    for batch in torch.randperm(num_batches, generator=generator).tolist():
        shuffled += rows[batch * batch_size : (batch + 1) * batch_size]
    return shuffled + order[in_batches:]


@dataclass(eq=False)
class LengthGroups(Sampler[int]):
    """The order of `by_length`; `epoch` is called at its beginning, as a run may be resumed."""

    lengths: Sequence[int]
    batch_size: int
    seed: int
    epoch: Callable[[], int]

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(by_length(self.lengths, self.batch_size, self.seed, self.epoch()))
