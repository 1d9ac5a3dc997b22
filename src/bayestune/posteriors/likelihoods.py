"""Likelihoods: what logits mean (classes, labels, numbers, rewards), and their predictions."""

import math
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from bayestune.errors import Refusal
from bayestune.posteriors.prediction import Prediction

P_co = TypeVar("P_co", covariant=True)


class Likelihood(Protocol[P_co]):
    """How the logits of draws become a prediction."""

    def predictive(self, logits: Tensor, *, exact: bool) -> P_co:
        """The predictive of logits (S, N, …); `exact` if the draws are all there is."""
        ...


@dataclass(frozen=True)
class Softmax:
    """One of C classes, for each row or each token of it: p = softmax(f)."""

    def predictive(self, logits: Tensor, *, exact: bool) -> Prediction:
        """The predictive of logits (S, N, C), or (S, N, T, C) for tokens."""
        return Prediction.of(logits, exact=exact)


@dataclass(frozen=True)
class LabelPrediction:
    """For each of L labels by itself, whether a row has it; all (N, L), entropies in nats.

    Args:
        probabilities: mean over draws of sigmoid(logits).
        total_entropy: of the averaged probability of each label.
        expected_entropy: mean entropy of the draws' (aleatoric).
        mutual_information: their difference (epistemic) times S/(S − 1), as in `Prediction`.
    """

    probabilities: Tensor
    total_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor

    @property
    def choice(self) -> Tensor:
        """Which labels are more probable than not."""
        return self.probabilities > 0.5


@dataclass(frozen=True)
class Sigmoid:
    """L labels, of which a row may have several: p(label) = sigmoid(f)."""

    def predictive(self, logits: Tensor, *, exact: bool) -> LabelPrediction:
        """The predictive of logits (S, N, L)."""
        pairs = torch.stack([torch.zeros_like(logits), logits], -1)
        has_or_not = Prediction.of(pairs, exact=exact)
        return LabelPrediction(
            has_or_not.probabilities[..., 1],
            has_or_not.total_entropy,
            has_or_not.expected_entropy,
            has_or_not.mutual_information,
        )


@dataclass(frozen=True)
class RegressionPrediction:
    """Numbers with their variances, (N, K) for K targets.

    Args:
        mean: over draws.
        epistemic: variance over draws, divided by S − 1, or by S where the draws are all there is.
        aleatoric: variance of the noise; None if it is not known.
    """

    mean: Tensor
    epistemic: Tensor
    aleatoric: Tensor | None

    @property
    def total(self) -> Tensor:
        """Variance of a target: aleatoric plus epistemic.

        Raises:
            Refusal: if the noise is not known.
        """
        if self.aleatoric is None:
            raise Refusal(
                "the noise of the targets is not known: got a Regression() without noise_var, "
                "expected one; take Regression.fitted(prediction, targets) on held-out rows"
            )
        return self.aleatoric + self.epistemic

    @property
    def std(self) -> Tensor:
        """Standard deviation of a target, √total."""
        return self.total.sqrt()

    def log_density(self, targets: Tensor) -> Tensor:
        """log N(y; mean, total) of targets (N, K), or (N,) where K is 1."""
        targets = _like(targets, self.mean)
        deviation = (targets - self.mean).square() / self.total
        return -0.5 * (deviation + (2 * math.pi * self.total).log())


@dataclass(frozen=True)
class Regression:
    """Numbers with Gaussian noise: y ~ N(f, σ²).

    Args:
        noise_var: σ², one number or one for each target, (K,); None if it is not known.
        head_gives_variance: whether the head gives K means and behind them K values of log σ².

    Raises:
        Refusal: if both give the noise, or a variance is negative.
    """

    noise_var: float | Tensor | None = None
    head_gives_variance: bool = False

    def __post_init__(self) -> None:
        if self.noise_var is None:
            return
        if self.head_gives_variance:
            raise Refusal(
                "the noise is said twice: got noise_var and head_gives_variance, expected one"
            )
        if not (torch.as_tensor(self.noise_var) >= 0).all():
            raise Refusal(f"a variance is not negative: got noise_var={self.noise_var}")

    def predictive(self, logits: Tensor, *, exact: bool) -> RegressionPrediction:
        """The predictive of a head's outputs (S, N, K), or (S, N, 2K) with variances.

        Raises:
            Refusal: if the head should give a variance for each mean and has an odd number.
        """
        values = logits.double()
        aleatoric = None
        if self.head_gives_variance:
            if values.shape[-1] % 2:
                raise Refusal(
                    f"means and log-variances come in pairs: got {values.shape[-1]} outputs, "
                    "expected an even number; set num_labels to twice the targets"
                )
            values, log_vars = values.chunk(2, -1)
            aleatoric = log_vars.exp().mean(0)
        mean = values.mean(0)
        if self.noise_var is not None:
            aleatoric = _for_each_target(torch.as_tensor(self.noise_var).to(mean), mean)
        return RegressionPrediction(mean, _variance(values, exact), aleatoric)

    @classmethod
    def fitted(cls, prediction: RegressionPrediction, targets: Tensor) -> "Regression":
        """σ² of each target from rows with answers: mean of (y − mean)² − epistemic, at least 0.

        Rows that were trained on give too small a σ²; take held-out ones.

        Args:
            prediction: of those rows.
            targets: y (N, K), or (N,) where K is 1; NaN where one is missing.

        Raises:
            Refusal: if the targets do not fit, or no row has one of them.
        """
        targets = _like(targets, prediction.mean)
        if missing := targets.isnan().all(0).nonzero().flatten().tolist():
            raise Refusal(
                f"the noise of a target is found on rows that have it: got NaN in all "
                f"{len(targets)} rows of the targets {missing}, expected a number in one or more; "
                "give held-out rows with answers, or noise_var"
            )
        error = (targets - prediction.mean).square()
        return cls((error - prediction.epistemic).nanmean(0).clamp_min(0))


@dataclass(frozen=True)
class RewardPrediction:
    """Rewards of N texts under S draws.

    Args:
        rewards: (S, N); each draw's are known up to a constant of its own.
        exact: whether the draws are all there is.
    """

    rewards: Tensor
    exact: bool = False

    @property
    def mean(self) -> Tensor:
        """Over draws, (N,)."""
        return self.rewards.mean(0)

    @property
    def std(self) -> Tensor:
        """Over draws, (N,); 0 for one draw."""
        return _variance(self.rewards, self.exact).sqrt()

    def lower(self, k: float = 1.0) -> Tensor:
        """Mean less k standard deviations, (N,)."""
        return self.mean - k * self.std

    def best_of(self, n: int, k: float = 1.0, *, centred: bool = False) -> Tensor:
        """Which of each n consecutive texts has the largest mean − k·std, (N/n,), from 0.

        Args:
            n: the number of texts that answer one prompt; they are given one after the other.
            k: how much disagreement costs; 0 for the largest mean.
            centred: whether each draw's average over the n is first subtracted from its rewards.
                Then a constant of each draw's own, which preferences leave open, changes nothing:
                for members of an ensemble, fitted separately. Two texts then have the same std.

        Raises:
            Refusal: if N is not a multiple of n.
        """
        if n < 1 or self.rewards.shape[1] % n:
            raise Refusal(
                f"texts come in groups of n: got {self.rewards.shape[1]} and n={n}, expected a "
                "multiple; give the candidates of one prompt one after the other"
            )
        groups = self.rewards.unflatten(1, (-1, n))
        if centred:
            groups = groups - groups.mean(-1, keepdim=True)
        lower = groups.mean(0) - k * _variance(groups, self.exact).sqrt()
        return lower.argmax(-1)

    def preferred(self, other: "RewardPrediction") -> Prediction:
        """Bradley–Terry: of each pair, p(this, other) with p(this) = mean_s σ(r_s − r′_s).

        Args:
            other: the rewards of N other texts, under the same draws.

        Raises:
            Refusal: if the numbers of draws or rows differ.
        """
        if self.rewards.shape != other.rewards.shape:
            raise Refusal(
                f"pairs are of the same draws: got {tuple(self.rewards.shape)} and "
                f"{tuple(other.rewards.shape)} rewards, expected as many; predict both alike"
            )
        return Prediction.of(torch.stack([self.rewards, other.rewards], -1), exact=self.exact)


@dataclass(frozen=True)
class Reward:
    """A number by which texts are preferred, p(i over j) = sigmoid(r_i − r_j) (Bradley–Terry)."""

    def predictive(self, logits: Tensor, *, exact: bool) -> RewardPrediction:
        """The predictive of a head's outputs (S, N, 1).

        Raises:
            Refusal: if the head has more than one output.
        """
        if logits.shape[-1] != 1 or logits.dim() != 3:
            raise Refusal(
                f"a reward is one number a row: got logits of shape {tuple(logits.shape)}, "
                "expected (S, N, 1); load the model with num_labels=1"
            )
        return RewardPrediction(logits[..., 0].double(), exact)


LIKELIHOODS = {
    "softmax": Softmax(),
    "sigmoid": Sigmoid(),
    "regression": Regression(),
    "reward": Reward(),
}


def _variance(values: Tensor, exact: bool) -> Tensor:
    """Variance over the leading axis, with S − 1 for a sample; 0 for one draw."""
    return values.var(0, correction=0 if exact or len(values) == 1 else 1)


def _like(targets: Tensor, mean: Tensor) -> Tensor:
    """Targets (N, K), or (N,) where K is 1, in the shape and type of a mean (N, K)."""
    targets = torch.as_tensor(targets).to(mean)
    if targets.dim() == mean.dim() - 1 and mean.shape[-1] == 1:
        targets = targets[..., None]
    if targets.shape != mean.shape:
        raise Refusal(
            f"a target for each prediction: got targets of shape {tuple(targets.shape)}, expected "
            f"{tuple(mean.shape)}"
        )
    return targets


def _for_each_target(noise_var: Tensor, mean: Tensor) -> Tensor:
    """One variance, or one for each target, in the shape of a mean (N, K)."""
    if noise_var.shape not in ((), (1,), mean.shape[-1:]):
        raise Refusal(
            f"a variance for each target: got {tuple(noise_var.shape)}, expected one number or "
            f"{tuple(mean.shape[-1:])}; the head has {mean.shape[-1]} targets"
        )
    return noise_var.expand_as(mean)
