"""From probabilities and labels to numbers: proper scores, calibration and ranking, each with a bootstrap interval.

Probabilities are (N, C), a row a question, each summing to 1, missing options padded with exactly 0; labels are (N,)
class indices. Whatever is not so raises ValueError, in every function here. All is computed in float64.
Inside, a metric is a function of row *weights*: ones give its value, the counts of a bootstrap resample give its value
on that resample, so that many resamples are one matrix product.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

BINNINGS = ("torchmetrics", "textbook")
# The least probability that a float32 softmax holds at full precision: a label of probability 0 costs 87.3 nats.
TINY = torch.finfo(torch.float32).tiny
_CHUNK = 2**21  # numbers in one block of resamples: 16 MiB


@dataclass(frozen=True)
class Interval:
    """A metric's value on `n` rows and its bootstrap interval, in the metric's unit."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """First minus second on the same `n` rows, its bootstrap interval and the two-sided p-value of no difference."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability diagram of B bins of equal width: rows, mean confidence and accuracy, (B,) each; NaN if empty."""

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor


@dataclass(frozen=True, eq=False)
class _Rows:
    """What the metrics need of each row, (N,) each; `rank` numbers the distinct confidences, highest first."""

    confidence: Tensor
    correct: Tensor
    nll: Tensor
    brier: Tensor
    rank: Tensor
    bin: Tensor


def _error(got: str, expected: str, remedy: str) -> ValueError:
    return ValueError(f"got {got}; expected {expected}; {remedy}")


def _check(p: Tensor, y: Tensor) -> None:
    if p.ndim != 2 or y.shape != p.shape[:1] or p.numel() == 0:
        got = f"probabilities of shape {tuple(p.shape)} and labels of shape {tuple(y.shape)}"
        raise _error(
            got, "(N, C) and (N,), not empty", "average the draws first: logits.softmax(-1).mean(0)"
        )
    if y.is_floating_point() or y.min() < 0 or y.max() >= p.shape[1]:
        raise _error(
            f"labels from {y.min()} to {y.max()}",
            f"integers in 0…{p.shape[1] - 1}",
            "give class indices",
        )
    off = (p.double().sum(1) - 1).abs().max().item()
    if not off <= 1e-3 or p.min() < 0:  # NaN compares false
        got = f"rows that are no distributions (a sum is off 1 by {off:.3g}, the least entry is {p.min():.3g})"
        raise _error(
            got, "finite entries >= 0 with sums of 1 within 0.001", "apply softmax to finite logits"
        )


def _bin_index(confidence: Tensor, bins: int, binning: str) -> Tensor:
    if bins < 1:
        raise _error(f"bins={bins}", "1 or more", "15 is customary")
    if binning not in BINNINGS:
        raise _error(
            f"binning {binning!r}", f"one of {BINNINGS}", "choose 'textbook' for bins (l, u]"
        )
    single = (
        confidence.float()
    )  # as torchmetrics does; also puts a float32 0.2 and a float64 0.2 in the same bin
    if binning == "torchmetrics":
        edges = torch.linspace(0, 1, bins + 1, dtype=torch.float32)
        return torch.bucketize(single, edges, right=True) - 1
    edges = (torch.arange(bins + 1, dtype=torch.float64) / bins).float()
    return (torch.bucketize(single, edges) - 1).clamp(0, bins - 1)


def _rows(
    probabilities: Tensor, labels: Tensor, bins: int = 15, binning: str = "torchmetrics"
) -> _Rows:
    _check(probabilities, labels)
    p, y = probabilities.detach().cpu().double(), labels.detach().cpu().long()
    confidence, choice = p.max(1)
    nll = -p.gather(1, y[:, None])[:, 0].clamp(min=TINY).log()
    brier = (p - one_hot(y, p.shape[1])).square().sum(1)
    rank = torch.unique(-confidence, return_inverse=True)[1]
    return _Rows(
        confidence, (choice == y).double(), nll, brier, rank, _bin_index(confidence, bins, binning)
    )


def _binned(rows: _Rows, weights: Tensor, bins: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, summed confidence and summed correctness of each bin: (R, B) each, up to the last bin in use by default."""
    member = one_hot(rows.bin, bins).double()
    columns = (member, member * rows.confidence[:, None], member * rows.correct[:, None])
    counts, confidence, correct = (weights @ torch.cat(columns, 1)).chunk(3, 1)
    return counts, confidence, correct


def _ece(rows: _Rows, weights: Tensor, debias: bool = False) -> Tensor:
    counts, confidence, correct = _binned(rows, weights)
    size = counts.clamp(min=1)
    rate, gap = correct / size, (correct - confidence).abs() / size
    if debias:
        std = (rate * (1 - rate) / size).clamp(min=TINY).sqrt()
        folded = std * (2 / torch.pi) ** 0.5 * torch.exp(-((gap / std) ** 2) / 2) + gap * torch.erf(
            gap / std / 2**0.5
        )
        gap = 2 * gap - folded
    return (counts * gap).sum(1).clamp(min=0) / counts.sum(1)


def _aurc(rows: _Rows, weights: Tensor) -> Tensor:
    # Among m tied rows with e errors, after a rows with E errors, the expected errors at a + j rows are E + j·e/m;
    # divided by a + j and summed over j = 1…m that is (E − a·e/m)·(H(a+m) − H(a)) + e, H the harmonic numbers.
    groups = weights.new_zeros(len(weights), int(rows.rank.max()) + 1)
    size = groups.index_add(1, rows.rank, weights)
    errors = groups.index_add(1, rows.rank, weights * (1 - rows.correct))
    after, before, missed = size.cumsum(1), size.cumsum(1) - size, errors.cumsum(1) - errors
    harmonic = torch.cat(
        [weights.new_zeros(1), (1 / torch.arange(1, len(rows.rank) + 1).double()).cumsum(0)]
    )
    span = harmonic[after.long()] - harmonic[before.long()]
    return ((missed - before * errors / size.clamp(min=1)) * span + errors).sum(1) / len(rows.rank)


_METRICS: dict[str, Callable[[_Rows, Tensor], Tensor]] = {
    "accuracy": lambda rows, weights: weights @ rows.correct / weights.sum(1),
    "nll": lambda rows, weights: weights @ rows.nll / weights.sum(1),
    "brier": lambda rows, weights: weights @ rows.brier / weights.sum(1),
    "ece": _ece,
    "ece_debiased": lambda rows, weights: _ece(rows, weights, debias=True),
    "aurc": _aurc,
}


def _value(metric: str, rows: _Rows) -> float:
    return _METRICS[metric](rows, rows.nll.new_ones(1, len(rows.nll))).item()


def _bootstrap(
    statistic: Callable[[Tensor], Tensor], num_rows: int, resamples: int, seed: int, level: float
) -> tuple[Tensor, list[list[float]]]:
    """The statistic ((R, N) counts of the rows → (M, R)) on all resamples, and its percentiles: M low, M high ends."""
    if resamples < 1:
        raise _error(f"resamples={resamples}", "1 or more", "1000 is customary")
    if not 0 < level < 1:
        raise _error(f"level={level}", "a number between 0 and 1", "0.95 is customary")
    generator, blocks = torch.Generator().manual_seed(seed), []
    for start in range(0, resamples, block := max(1, _CHUNK // num_rows)):
        drawn = torch.randint(
            num_rows, (min(block, resamples - start), num_rows), generator=generator
        )
        blocks.append(
            statistic(
                torch.zeros_like(drawn).scatter_add_(1, drawn, torch.ones_like(drawn)).double()
            )
        )
    values = torch.cat(blocks, 1)
    return values, torch.quantile(
        values, values.new_tensor([(1 - level) / 2, (1 + level) / 2]), dim=1
    ).tolist()


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share of rows whose top class (the first of equals) is the label: mean_i 1[argmax_c p_ic = y_i].

    Args: probabilities (N, C), labels (N,). Returns: a number in [0, 1]. Raises: ValueError, as for all metrics.
    >>> accuracy(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), torch.tensor([1, 1, 1])) * 3
    1.0
    """
    return _value("accuracy", _rows(probabilities, labels))


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood, −mean_i log max(p_{i, y_i}, `TINY`); the clip at 1.2e-38 is the only one.

    Args: probabilities (N, C), labels (N,). Returns: nats, lower is better. Raises: ValueError.
    Reference: Gneiting, Raftery (2007), https://doi.org/10.1198/016214506000001437
    >>> round(nll(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), torch.tensor([0, 1, 1])), 4)
    0.4149
    """
    return _value("nll", _rows(probabilities, labels))


def brier(probabilities: Tensor, labels: Tensor) -> float:
    """Squared distance to the one-hot label, summed over all classes: mean_i Σ_c (p_ic − 1[c = y_i])².

    Args: probabilities (N, C), labels (N,). Returns: a number in [0, 2], lower is better. Raises: ValueError.
    Reference: Brier (1950), https://doi.org/10.1175/1520-0493(1950)078%3C0001:VOFEIT%3E2.0.CO;2
    >>> round(brier(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), torch.tensor([0, 1, 1])), 4)
    0.2733
    """
    return _value("brier", _rows(probabilities, labels))


def ece(
    probabilities: Tensor, labels: Tensor, bins: int = 15, binning: str = "torchmetrics"
) -> float:
    """Expected calibration error of the top-1 confidence, in bins of equal width: Σ_b n_b/N · |acc_b − conf_b|.

    Args: probabilities (N, C); labels (N,); bins, their number; binning, "textbook" for bins (l, u] with 0 in the
    first, "torchmetrics" for its bins [l, u) and one more for a confidence of exactly 1 (rounded to float32).
    Returns: a number in [0, 1], lower is better; biased upwards, as sampling noise is a gap too. Raises: ValueError.
    Reference: Guo, Pleiss, Sun, Weinberger (2017), https://arxiv.org/abs/1706.04599
    >>> p, y = torch.tensor([[1.0, 0.0], [0.05, 0.95]]), torch.tensor([1, 1])
    >>> [round(ece(p, y, binning=binning), 3) for binning in BINNINGS]
    [0.525, 0.475]
    """
    return _value("ece", _rows(probabilities, labels, bins, binning))


def ece_debiased(
    probabilities: Tensor, labels: Tensor, bins: int = 15, binning: str = "torchmetrics"
) -> float:
    """ECE less the bias from the noise in each bin's accuracy: max(0, Σ_b n_b/N · (2 |g_b| − E|X_b|)).

    Here g_b = acc_b − conf_b and X_b ~ Normal(g_b, acc_b (1 − acc_b)/n_b), so that the bias is E|X_b| − |g_b|.
    Args: as for `ece`. Returns: a number in [0, 1], lower is better. With this plug-in variance, bins all right or all
    wrong (as those of one row) are not corrected: part of the bias stays. Raises: ValueError.
    Reference: Kumar, Liang, Ma (2019), Verified Uncertainty Calibration, https://arxiv.org/abs/1909.10155
    >>> [round(f(torch.tensor([[0.7, 0.3]] * 4), torch.tensor([0, 0, 0, 1])), 4) for f in (ece, ece_debiased)]
    [0.05, 0.0]
    """
    return _value("ece_debiased", _rows(probabilities, labels, bins, binning))


def aurc(probabilities: Tensor, labels: Tensor) -> float:
    """Area under the risk–coverage curve: 1/N Σ_k (errors among the k most confident rows)/k, ties in expectation.

    Args: probabilities (N, C), labels (N,). Returns: a number in [0, 1], lower is better, the error rate if all
    confidences are equal. Raises: ValueError.
    Reference: Geifman, Uziel, El-Yaniv (2019), https://arxiv.org/abs/1805.08206
    >>> round(aurc(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), torch.tensor([0, 1, 1])), 4)
    0.1111
    """
    return _value("aurc", _rows(probabilities, labels))


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Count, mean confidence and accuracy of the top-1 class in each textbook bin (l, u], for plots.

    Args: probabilities (N, C), labels (N,), bins. Returns: tensors of B bins (1 is in the last). Raises: ValueError.
    Reference: DeGroot, Fienberg (1983), https://doi.org/10.2307/2987588
    >>> reliability(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]), bins=2).accuracy
    tensor([   nan, 0.5000], dtype=torch.float64)
    """
    rows = _rows(probabilities, labels, bins, "textbook")
    counts, confidence, correct = (
        sums[0] for sums in _binned(rows, rows.nll.new_ones(1, len(labels)), bins)
    )
    return Reliability(counts.long(), confidence / counts, correct / counts)


def summarise(
    probabilities: Tensor,
    labels: Tensor,
    *,
    bins: int = 15,
    binning: str = "torchmetrics",
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """All metrics, with percentile intervals [q((1−level)/2), q((1+level)/2)] over resamples of the N rows.

    Args: probabilities (N, C); labels (N,); bins and binning as for `ece`; resamples, their number R; seed, of the
    resampling alone; level, the interval's mass. Returns: an Interval per name: accuracy, nll, brier, ece,
    ece_debiased, aurc. The calibration errors' lie high: a resample's own noise is a gap too. Raises: ValueError.
    Reference: Efron, Tibshirani (1993), https://doi.org/10.1201/9780429246593
    >>> summarise(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1]))["accuracy"]
    Interval(value=1.0, low=1.0, high=1.0, n=2)
    """
    rows, n = _rows(probabilities, labels, bins, binning), len(labels)
    low, high = _bootstrap(
        lambda w: torch.stack([m(rows, w) for m in _METRICS.values()]), n, resamples, seed, level
    )[1]
    return {key: Interval(_value(key, rows), low[i], high[i], n) for i, key in enumerate(_METRICS)}


def paired_bootstrap(
    first: Tensor,
    second: Tensor,
    labels: Tensor,
    metric: str = "nll",
    resamples: int = 1000,
    *,
    bins: int = 15,
    binning: str = "torchmetrics",
    seed: int = 0,
    level: float = 0.95,
) -> PairedDifference:
    """Difference of a metric of two methods, every resample taken of both: p = (1 + #{|d*_r − d| ≥ |d|})/(1 + R).

    Args: first and second (N, C), the same rows in the same order, or (K, N, C) for K runs of each, whose metrics are
    averaged: the runs are held, the rows resampled; labels (N,); metric, a key of `summarise`; the others as for
    `summarise`. Returns: d = first − second in the metric's unit, its percentile interval, and p, two sided and at
    least 1/(1 + R). Raises: ValueError.
    Reference: Davison, Hinkley (1997), ch. 4, https://doi.org/10.1017/CBO9780511802843
    >>> sure, unsure = torch.tensor([[0.9, 0.1]]).repeat(9, 1), torch.tensor([[0.6, 0.4]]).repeat(9, 1)
    >>> paired_bootstrap(sure, unsure, torch.zeros(9, dtype=torch.long)).difference
    -0.4054...
    """
    if metric not in _METRICS:
        raise _error(f"metric {metric!r}", f"one of {tuple(_METRICS)}", "choose one of them")
    stacked = first.ndim == second.ndim == 3
    if stacked and len(first) != len(second):
        got = f"{len(first)} and {len(second)} runs"
        raise _error(got, "as many of both", "compare the runs that both methods have")
    ones, twos = (
        [_rows(p, labels, bins, binning) for p in (x if stacked else x[None])]
        for x in (first, second)
    )
    weigh, n = _METRICS[metric], len(labels)

    def difference(weights: Tensor) -> Tensor:
        return torch.stack(
            [weigh(a, weights) - weigh(b, weights) for a, b in zip(ones, twos, strict=True)]
        ).mean(0)

    d = difference(ones[0].nll.new_ones(1, n)).item()
    drawn, (low, high) = _bootstrap(lambda w: difference(w)[None], n, resamples, seed, level)
    extreme = int(((drawn - d).abs() >= abs(d) - 1e-12).sum())  # equal but for rounding is extreme
    return PairedDifference(d, low[0], high[0], (1 + extreme) / (1 + resamples), n)
