"""What every method is."""

from typing import Protocol

from torch import nn

from bayestune.posteriors import Posterior
from bayestune.scoring import Scorer
from bayestune.training import Training


class Method(Protocol):
    """What every method is: frozen hyper-parameters and one verb."""

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Posterior:
        """Fits adapters on `model`, whose own weights stay as they are, and returns the distribution over them."""
        ...
