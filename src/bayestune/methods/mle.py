"""Maximum likelihood: plain LoRA, the baseline of every table."""

from dataclasses import dataclass

from torch import nn

from bayestune.posteriors import Point
from bayestune.scoring import Scorer
from bayestune.training import Training, start_adapter, train


@dataclass(frozen=True)
class MLE:
    """Plain LoRA: minimises −Σ log p(answer | question) over A and B.

    Reference:
        Hu et al.: LoRA, ICLR 2022, https://arxiv.org/abs/2106.09685.
    """

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Point:
        """Trains a fresh adapter on `model` and returns it as a point.

        Args:
            model: a transformers model without adapters.
            scorer: the task, bound to the model's tokenizer.
            training: the adapter and how it is trained.
        """
        adapted = start_adapter(model, training)
        report = train(adapted, scorer, training)
        return Point(adapted, scorer, report=report)
