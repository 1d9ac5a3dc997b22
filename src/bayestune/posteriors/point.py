"""A point: all the mass on one adapter."""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from bayestune.forward import Batch, Draws, mean_logits
from bayestune.posteriors.posterior import AdapterPosterior, Saved, State


@dataclass
class Point(AdapterPosterior):
    """A posterior with all its mass on one adapter: what maximum likelihood and MAP return."""

    kind: ClassVar[str] = "point"

    @property
    def atoms(self) -> int:
        """One."""
        return 1

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """Nothing: no draw differs from the mean."""
        return {}

    def _drawn(self, inputs: Batch, draws: Draws) -> Tensor:
        logits = mean_logits(self.model, self.scorer, inputs)
        return logits.expand(draws.count, *logits.shape[1:])

    def state(self) -> State:
        """Nothing: the stock adapter is all."""
        return {}, {}

    @classmethod
    def restore(cls, saved: Saved) -> Self:  # noqa: D102
        return cls(saved.model, saved.scorer, adapter=saved.adapter)
