"""A point: all the mass on one adapter."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from bayestune.adapters import ADAPTER
from bayestune.forward import Batch, ClassLogits, Draws, mean_logits
from bayestune.posteriors.posterior import Saved, State


@dataclass
class Point:
    """A posterior with all its mass on one adapter: what maximum likelihood and MAP return.

    Args:
        model: a PEFT model.
        score: maps (model, batch) to class logits (N, C).
        fitted: what the fit reports: seconds, steps, log.
        adapter: which adapter.
    """

    kind: ClassVar[str] = "point"
    model: nn.Module
    score: ClassLogits
    fitted: Mapping[str, Any] = field(default_factory=dict, repr=False)
    adapter: str = ADAPTER
    has_mean: bool = field(default=True, init=False)
    atoms: int | None = field(default=1, init=False)

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """Nothing: no draw differs from the mean."""
        return {}

    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """The adapter's logits, the same for every draw: (S, N, C), (1, N, C) for the mean."""
        logits = mean_logits(self, inputs)
        return logits.expand(max(1, draws.count), *logits.shape[1:])

    def state(self) -> State:
        """Nothing: the stock adapter is all."""
        return {}, {}

    @classmethod
    def restore(cls, saved: Saved) -> Self:  # noqa: D102
        return cls(saved.model, saved.score, adapter=saved.adapter)
