"""What every method is."""

from typing import Protocol

from torch import nn

from bayestune.posteriors import Posterior
from bayestune.scoring import Scorer
from bayestune.training import Training


class Method(Protocol):
    """A frozen dataclass of hyper-parameters, and one verb."""

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Posterior:
        """Fits adapters on a model, whose own weights stay as they are.

        Args:
            model: a transformers model without adapters.
            scorer: the task, bound to the model's tokenizer.
            training: the adapter and how it is trained.

        Returns:
            The distribution over adapters.

        Raises:
            Refusal: if there are no training rows, or the base, the model's layers or the
                held-out rows do not suit the method.
            NotFiniteError: if the loss is NaN or infinite.
            Interrupted: at ctrl-C, after a checkpoint.
        """
        ...
