"""BLoB with the noise of its authors' public code, in training and at prediction: to compare with."""

from dataclasses import dataclass

from torch import nn

from bayestune.forms import TokenNoise
from bayestune.layers import Noise
from bayestune.methods.blob import BLoB
from bayestune.scoring import Scorer
from bayestune.training import Training


@dataclass(frozen=True)
class AuthorsBLoB(BLoB):
    """BLoB whose noise is new for every token, not only in training (`noise="token"`) but in every drawn pass too.

    The other fields are BLoB's; their defaults are the authors' already (bursts, `kl_lr` 0.01, G by SGD). A draw is no
    function of the row, so it cannot be exported. docs/fidelity.md has what that changes.

    Reference:
        Wang, Shi, Han, Metaxas, Wang: BLoB, NeurIPS 2024, https://arxiv.org/abs/2406.11675, and its public code,
        https://github.com/Wang-ML-Lab/bayesian-peft.
    """

    noise: Noise = "token"

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> TokenNoise:  # type: ignore[override]
        """Trains as BLoB; draws are noisy passes, see `TokenNoise`."""
        gaussian = super().fit(model, scorer, training)
        return TokenNoise(gaussian.model, scorer, gaussian.fitted, gaussian.adapter)
