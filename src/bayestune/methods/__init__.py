"""The methods: frozen hyper-parameters and one verb, `fit(model, scorer, training) → Posterior`."""

from typing import Protocol

from torch import nn

from bayestune.methods.blob import BLoB
from bayestune.methods.mle import MLE
from bayestune.posterior import Posterior
from bayestune.scoring import Scorer
from bayestune.training import Training

__all__ = ["METHODS", "MLE", "BLoB", "Method"]


class Method(Protocol):
    """What every method is."""

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Posterior:
        """Fits adapters on `model`, whose own weights stay as they are, and returns the distribution over them."""
        ...


METHODS: dict[str, type[Method]] = {"mle": MLE, "blob": BLoB}
