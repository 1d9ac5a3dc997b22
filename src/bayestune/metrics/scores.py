"""Scores of probabilities against labels: accuracy, NLL, Brier score, calibration errors, AURC.

Probabilities are (N, C): each row sums to 1 and holds exactly 0 for options it does not have.
Labels are (N,) class indices. Every function raises Refusal on anything else and computes in
float64. Except for accuracy, lower is better.

Inside, a metric is a function of row *weights*: ones give its value, and the counts of a bootstrap
resample give its value on that resample, so that many resamples are one matrix product.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from bayestune.errors import Refusal

Binning = Literal["torchmetrics", "textbook"]
_TINY = torch.finfo(torch.float64).tiny
_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Bins:
    """B = `number` bins of equal width for the top-1 confidence.

    "textbook" bins are (l, u] with 0 in the first; "torchmetrics" has bins [l, u) and one more for
    a confidence of exactly 1 (rounded to float32).
    """

    number: int = 15
    binning: Binning = "torchmetrics"

    def __post_init__(self) -> None:
        if self.number < 1:
            raise Refusal(f"got bins={self.number}; expected 1 or more; 15 is customary")
        if self.binning not in get_args(Binning):
            expected = f"one of {get_args(Binning)}; choose 'textbook' for bins (l, u]"
            raise Refusal(f"got binning {self.binning!r}; expected {expected}")

    def of(self, confidence: Tensor) -> Tensor:
        """The index of each confidence's bin, (N,)."""
        # Single precision as in torchmetrics: a float32 0.2 and a float64 0.2 are in the same bin.
        single = confidence.float()
        if self.binning == "torchmetrics":
            edges = torch.linspace(0, 1, self.number + 1, dtype=torch.float32)
            return torch.bucketize(single, edges, right=True) - 1
        edges = (torch.arange(self.number + 1, dtype=torch.float64) / self.number).float()
        return (torch.bucketize(single, edges) - 1).clamp(0, self.number - 1)


DEFAULT_BINS = Bins()


@dataclass(frozen=True, eq=False)
class Reliability:
    """Rows, mean confidence and accuracy of B bins, (B,) each; means of no rows are NaN."""

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor


@dataclass(frozen=True, eq=False)
class RowTerms:
    """What the metrics need of N rows, (N,) each; `rank` numbers the confidences, highest first."""

    confidence: Tensor
    correct: Tensor
    nll: Tensor
    brier: Tensor
    rank: Tensor
    bin: Tensor

    @classmethod
    def of(
        cls,
        probabilities: Tensor,
        labels: Tensor,
        bins: Bins = DEFAULT_BINS,
        losses: Tensor | None = None,
    ) -> "RowTerms":
        """Checks the rows and scores each; `losses` (N,) replace −log p_{i, y_i}, in nats."""
        _check(probabilities, labels)
        p = probabilities.detach().cpu().double()
        y = labels.detach().cpu().long()
        confidence, choice = p.max(1)
        if losses is None:
            nll = _log_loss(p.gather(1, y[:, None])[:, 0], probabilities.dtype)
        else:
            nll = losses.detach().cpu().double()
        if nll.shape != y.shape:
            got = f"losses of shape {tuple(nll.shape)} for {len(y)} rows"
            raise Refusal(f"got {got}; expected (N,), one a row; leave them out")
        return cls(
            confidence=confidence,
            correct=(choice == y).double(),
            nll=nll,
            brier=(p - one_hot(y, p.shape[1])).square().sum(1),
            rank=torch.unique(-confidence, return_inverse=True)[1],
            bin=bins.of(confidence),
        )

    @property
    def ones(self) -> Tensor:
        """The weights (1, N) that give a metric's value on the rows themselves."""
        return self.nll.new_ones(1, len(self.nll))


def _log_loss(p: Tensor, dtype: torch.dtype) -> Tensor:
    """−log p of float64 p; a 0 counts as the least number above 0 of `dtype`, its type before."""
    limits = torch.finfo(dtype if dtype.is_floating_point else torch.float64)
    loss_of_zero = -(math.log(limits.tiny) + math.log(limits.eps))
    return torch.where(p > 0, -p.clamp(min=_TINY * _EPS).log(), loss_of_zero)


def _check(p: Tensor, y: Tensor) -> None:
    if p.ndim != 2 or y.shape != p.shape[:1] or p.numel() == 0:
        got = f"probabilities of shape {tuple(p.shape)} and labels of shape {tuple(y.shape)}"
        expected = "(N, C) and (N,), not empty; average the draws first: logits.softmax(-1).mean(0)"
        raise Refusal(f"got {got}; expected {expected}")
    if y.is_floating_point() or y.min() < 0 or y.max() >= p.shape[1]:
        expected = f"integers in 0…{p.shape[1] - 1}; give class indices"
        raise Refusal(f"got labels from {y.min()} to {y.max()}; expected {expected}")
    off = (p.double().sum(1) - 1).abs().max().item()
    if not off <= 1e-3 or p.min() < 0:  # NaN compares false
        got = f"a sum that differs from 1 by {off:.3g} and a least entry of {p.min():.3g}"
        expected = "finite probabilities >= 0, sums of 1 ± 0.001; apply softmax to finite logits"
        raise Refusal(f"got rows with {got}; expected {expected}")


def _binned(rows: RowTerms, weights: Tensor, bins: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """Of each bin the number of rows, the summed confidence and the summed correctness, (R, B).

    B is the number of `bins`; −1 counts them up to the last one in use.
    """
    member = one_hot(rows.bin, bins).double()
    columns = [member, member * rows.confidence[:, None], member * rows.correct[:, None]]
    counts, confidence, correct = (weights @ torch.cat(columns, 1)).chunk(3, 1)
    return counts, confidence, correct


def _ece(rows: RowTerms, weights: Tensor) -> Tensor:
    counts, confidence, correct = _binned(rows, weights)
    gap = (correct - confidence).abs() / counts.clamp(min=1)
    return (counts * gap).sum(1) / counts.sum(1)


def _ece_debiased(rows: RowTerms, weights: Tensor) -> Tensor:
    counts, confidence, correct = _binned(rows, weights)
    size = counts.clamp(min=1)
    rate = correct / size
    gap = (correct - confidence).abs() / size
    std = (rate * (1 - rate) / size).clamp(min=_TINY).sqrt()
    # E|X| of X ~ Normal(gap, std²): the mean of the folded normal distribution.
    folded = std * (2 / torch.pi) ** 0.5 * torch.exp(-((gap / std) ** 2) / 2)
    folded += gap * torch.erf(gap / std / 2**0.5)
    return (counts * (2 * gap - folded)).sum(1).clamp(min=0) / counts.sum(1)


def _aurc(rows: RowTerms, weights: Tensor) -> Tensor:
    # Among m tied rows with e errors, after a rows with E errors, the expected errors at a + j rows
    # are E + j·e/m; divided by a + j and summed over j = 1…m that is
    # (E − a·e/m)·(H(a + m) − H(a)) + e, with the harmonic numbers H.
    num_rows = len(rows.rank)
    groups = weights.new_zeros(len(weights), int(rows.rank.max()) + 1)
    size = groups.index_add(1, rows.rank, weights)
    errors = groups.index_add(1, rows.rank, weights * (1 - rows.correct))
    after = size.cumsum(1)
    before = after - size
    missed = errors.cumsum(1) - errors
    terms = 1 / torch.arange(1, num_rows + 1).double()
    harmonic = torch.cat([weights.new_zeros(1), terms.cumsum(0)])
    span = harmonic[after.long()] - harmonic[before.long()]
    return ((missed - before * errors / size.clamp(min=1)) * span + errors).sum(1) / num_rows


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return weights @ values / weights.sum(1)


# Each maps rows and weights (R, N) to the metric under each of the R weightings, (R,).
METRICS: dict[str, Callable[[RowTerms, Tensor], Tensor]] = {
    "accuracy": lambda rows, weights: _mean(rows.correct, weights),
    "nll": lambda rows, weights: _mean(rows.nll, weights),
    "brier": lambda rows, weights: _mean(rows.brier, weights),
    "ece": _ece,
    "ece_debiased": _ece_debiased,
    "aurc": _aurc,
}


def _score(metric: str, probabilities: Tensor, labels: Tensor, bins: Bins = DEFAULT_BINS) -> float:
    rows = RowTerms.of(probabilities, labels, bins)
    return METRICS[metric](rows, rows.ones).item()


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share of rows whose top class (the first of equals) is the label, mean_i 1[argmax p_i = y_i].

    >>> accuracy(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), torch.tensor([1, 1, 1])) * 3
    1.0
    """
    return _score("accuracy", probabilities, labels)


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood in nats, −mean_i log p_{i, y_i}.

    A probability of 0 counts as the least number above 0 of its type, 744.4 nats in float64 and
    103.3 in float32, which is a lower bound: give float64 probabilities. `evaluate` takes the
    losses from logits and has no bound.

    >>> round(nll(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), torch.tensor([0, 1, 1])), 4)
    0.4149

    Reference: Gneiting, Raftery (2007), https://doi.org/10.1198/016214506000001437
    """
    return _score("nll", probabilities, labels)


def brier(probabilities: Tensor, labels: Tensor) -> float:
    """Squared distance to the one-hot label, mean_i Σ_c (p_ic − 1[c = y_i])², in [0, 2].

    >>> round(brier(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), torch.tensor([0, 1, 1])), 4)
    0.2733

    Reference: Brier (1950), https://doi.org/10.1175/1520-0493(1950)078%3C0001:VOFEIT%3E2.0.CO;2
    """
    return _score("brier", probabilities, labels)


def ece(probabilities: Tensor, labels: Tensor, bins: Bins = DEFAULT_BINS) -> float:
    """Expected calibration error of the top-1 confidence, Σ_b n_b/N · |acc_b − conf_b|, in [0, 1].

    It is biased upwards, because sampling noise is a gap too: of a calibrated model it is not 0 but
    what `calibrated_level` says.

    >>> p = torch.tensor([[1.0, 0.0], [0.05, 0.95]])
    >>> round(ece(p, torch.tensor([1, 1])), 3)
    0.525
    >>> round(ece(p, torch.tensor([1, 1]), Bins(binning="textbook")), 3)
    0.475

    Reference: Guo, Pleiss, Sun, Weinberger (2017), https://arxiv.org/abs/1706.04599
    """
    return _score("ece", probabilities, labels, bins)


def ece_debiased(probabilities: Tensor, labels: Tensor, bins: Bins = DEFAULT_BINS) -> float:
    """ECE less a part of its bias, max(0, Σ_b n_b/N · (2 |g_b| − E|X_b|)).

    Here g_b = acc_b − conf_b and X_b ~ Normal(g_b, acc_b (1 − acc_b)/n_b). For a calibrated model
    it removes about 40 % of the bias, not all of it: the bias E|X_b| − |g_b| is taken at the
    observed |g_b|, which is itself too large. It stands in no table; compare ECE with
    `calibrated_level` instead.

    >>> p = torch.tensor([[0.7, 0.3]] * 4)
    >>> [round(f(p, torch.tensor([0, 0, 0, 1])), 4) for f in (ece, ece_debiased)]
    [0.05, 0.0]

    Reference: Kumar, Liang, Ma (2019), https://arxiv.org/abs/1909.10155
    """
    return _score("ece_debiased", probabilities, labels, bins)


def aurc(probabilities: Tensor, labels: Tensor) -> float:
    """Area under the risk–coverage curve, 1/N Σ_k (errors among the k most confident rows)/k.

    Tied rows count in expectation over their order; with equal confidences it is the error rate.

    >>> round(aurc(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), torch.tensor([0, 1, 1])), 4)
    0.1111

    Reference: Geifman, Uziel, El-Yaniv (2019), https://arxiv.org/abs/1805.08206
    """
    return _score("aurc", probabilities, labels)


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Count, mean confidence and accuracy of the top-1 class in each textbook bin, for plots.

    >>> reliability(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]), bins=2).accuracy
    tensor([   nan, 0.5000], dtype=torch.float64)

    Reference: DeGroot, Fienberg (1983), https://doi.org/10.2307/2987588
    """
    rows = RowTerms.of(probabilities, labels, Bins(bins, "textbook"))
    counts, confidence, correct = _binned(rows, rows.ones, bins)
    size = counts[0]
    return Reliability(size.long(), confidence[0] / size, correct[0] / size)
