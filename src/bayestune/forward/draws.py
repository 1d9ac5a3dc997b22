"""Which draws of a posterior to take, and how many rows may go through the model at once."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
ClassLogits = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Draws:
    """Which draws of a posterior, and how many rows may go through the model at once.

    Args:
        count: S; 0 means the mean.
        seed: of the set; draw i of one seed is always the same function.
        max_rows: at most so many rows (draws times rows) in one forward pass; None for no such bound.
        max_tokens: at most so many tokens (draws times rows times length) in one forward pass: the memory bound.
            A single draw of the batch always runs, whatever the bounds.
        first: the index of the first of the draws: `Draws(5, first=5)` goes on where `Draws(5)` ended.
        shared_prefix: m; an approximation where the mean adapter reads all but the last m tokens of the prompt, once
            for all draws, see `prefix.SharedPrefix`. None for exact draws.
    """

    count: int = 10
    seed: int = 0
    max_rows: int | None = None
    max_tokens: int = 16384
    first: int = 0
    shared_prefix: int | None = None

    def __post_init__(self) -> None:
        if self.count < 0 or self.first < 0:
            raise ValueError(
                f"draws are counted from 0: got count={self.count}, first={self.first}, expected neither to be "
                "negative; count=0 means the mean"
            )

    @property
    def indices(self) -> range:
        """Which draws of the set."""
        return range(self.first, self.first + self.count)

    def refuse_prefix(self, posterior: object) -> None:
        """For posteriors whose draws are no adapters.

        Raises:
            ValueError: if a shared prefix is asked for.
        """
        if self.shared_prefix is not None:
            raise ValueError(
                f"draws of {type(posterior).__name__} are no adapters and cannot share a prefix: got "
                f"shared_prefix={self.shared_prefix}, expected None"
            )

    def at_once(self, inputs: Batch) -> int:
        """How many draws of this batch run in one pass, at least 1."""
        rows, tokens = inputs["input_ids"].shape[0], inputs["input_ids"].numel()
        bound = min(self.count, self.max_tokens // tokens)
        return max(1, bound if self.max_rows is None else min(bound, self.max_rows // rows))


class Drawable(Protocol):
    """What a pass over drawn adapters needs: a posterior whose draws are adapters."""

    @property
    def model(self) -> nn.Module:
        """The PEFT model."""
        ...

    @property
    def score(self) -> ClassLogits:
        """Maps (model, batch) to class logits (N, C)."""
        ...

    @property
    def adapter(self) -> str:
        """The name of its PEFT adapter."""
        ...

    @property
    def has_mean(self) -> bool:
        """Whether the model's adapter is the posterior's mean."""
        ...

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """One held draw by slot name, what differs from the mean: A (r, k), B (d, r)."""
        ...


@contextmanager
def seeded(model: nn.Module, seed: int, index: int) -> Iterator[None]:
    """Seeds torch's generators by (seed, index) for the time of the context; the caller's random state is kept."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
        torch.manual_seed(1_000_003 * seed + index)
        yield


def on_device(inputs: Batch, model: nn.Module) -> dict[str, Tensor]:
    """The batch on the model's device."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()}
