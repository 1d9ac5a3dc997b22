"""A point: all the mass on one adapter."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from bayestune.forward import Batch, Draws, mean_logits
from bayestune.posteriors.posterior import AdapterPosterior


@dataclass
class Point(AdapterPosterior):
    """A posterior with all its mass on one adapter: what maximum likelihood and MAP return."""

    kind: ClassVar[str] = "point"
    atoms = 1

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """Nothing: no draw differs from the mean."""
        return {}

    def _drawn(self, inputs: Batch, draws: Draws) -> Tensor:
        logits = mean_logits(self.model, self.scorer, inputs)
        return logits.expand(draws.count, *logits.shape[1:])

    def _beside(self, draws: Draws) -> AbstractContextManager[Any]:
        return nullcontext()
