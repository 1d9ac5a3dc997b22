"""Maximum likelihood: plain LoRA, the baseline of every table."""

from dataclasses import dataclass

from torch import nn

from bayestune.posteriors import Point
from bayestune.scoring import Scorer
from bayestune.training import Training, fit_adapter


@dataclass(frozen=True)
class MLE:
    """Plain LoRA: minimises −Σ log p(answer | question) over A and B.

    Reference:
        Hu et al.: LoRA, ICLR 2022, https://arxiv.org/abs/2106.09685.
    """

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Point:
        """Trains an adapter."""
        adapted, report = fit_adapter(model, scorer, training)
        return Point(adapted, scorer, report=report)
