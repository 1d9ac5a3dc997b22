"""Intervals over rows, and whether two methods differ by more than chance.

Each metric has the interval that covers its true value in simulations, see docs/intervals.md. The R
resamples are the same in every call with as many rows. Functions raise Refusal for bad rows,
unequal numbers of runs, a metric whose differences have no interval, and fewer than one resample.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from bayestune.errors import Refusal
from bayestune.metrics.ece_interval import calibrated_scores, ece_interval
from bayestune.metrics.proportions import share_interval
from bayestune.metrics.scores import DEFAULT_BINS, METRICS, Bins, RowTerms

LEVEL = 0.95
COMPARED = ("accuracy", "nll", "brier", "aurc")
_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_NORMAL = NormalDist()
_BLOCK = 2**21  # numbers in one block of resamples: 16 MiB
_LEAST_SPREAD = 0.25  # a resample's least std as a share of the rows' std: without errors it is 0
_ROUNDING = 1e-12  # a spread below this share of the mean is rounding: all losses are equal
_FEWEST = 5  # AURC has an interval only with this many wrong rows, and as many right ones
_JACKKNIFE_GROUPS = 200  # of rows, each left out once to estimate the acceleration


@dataclass(frozen=True)
class Interval:
    """A metric's value on `n` rows and its 95 % interval, in the metric's unit; None if unknown."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class CalibratedLevel(Interval):
    """The ECE of a calibrated model with these confidences: mean, 5 % and 95 % quantile.

    `p_value` is the chance that it is at least the observed ECE.
    """

    p_value: float


@dataclass(frozen=True)
class PairedDifference:
    """First minus second on `n` rows, its interval, and the two-sided p-value of no difference."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int


def resampled(statistic: Callable[[Tensor], Tensor], num_rows: int, resamples: int) -> Tensor:
    """M statistics on all R resamples, (M, R); `statistic` maps counts (≤ R, N) to (M, ≤ R)."""
    if resamples < 1:
        raise Refusal(f"got resamples={resamples}; expected 1 or more; 1000 is customary")
    small = resamples * num_rows <= _BLOCK
    blocks = [_one_block(num_rows, resamples)] if small else _counts(num_rows, resamples)
    return torch.cat([statistic(counts) for counts in blocks], 1)


def _counts(num_rows: int, resamples: int) -> Iterator[Tensor]:
    """How often each resample has each row, in blocks (≤ R, N)."""
    generator = torch.Generator().manual_seed(0)
    block = max(1, _BLOCK // num_rows)
    for start in range(0, resamples, block):
        size = (min(block, resamples - start), num_rows)
        chosen = torch.randint(num_rows, size, generator=generator)
        counts = torch.zeros_like(chosen).scatter_add_(1, chosen, torch.ones_like(chosen))
        yield counts.double()


@lru_cache(maxsize=1)  # a table has many statistics of the same rows
def _one_block(num_rows: int, resamples: int) -> Tensor:
    return next(_counts(num_rows, resamples))


def _quantiles(values: Tensor, low: float, high: float) -> tuple[float, float]:
    ends = torch.quantile(values, values.new_tensor([low, high])).tolist()
    return ends[0], ends[1]


def _studentised(losses: Tensor, weights: Tensor) -> Tensor:
    """(mean of a resample − mean)/(its standard deviation), (R,)."""
    num_rows = len(losses)
    mean = losses.mean()
    means = weights @ losses / num_rows
    variances = weights @ (losses - mean).square() / num_rows - (means - mean).square()
    least = _LEAST_SPREAD * losses.std(correction=0)
    return (means - mean) / variances.clamp(min=0).sqrt().maximum(least)


def _mean_interval(losses: Tensor, studentised: Tensor) -> Interval:
    """The bootstrap-t interval of a mean of losses ≥ 0; none where all are the same."""
    value = losses.mean().item()
    spread = losses.std(correction=0).item()
    if not spread > _ROUNDING * abs(value):  # or NaN
        return Interval(value, None, None, len(losses))
    low, high = _quantiles(studentised, *_TAILS)
    return Interval(value, max(0.0, value - spread * high), value - spread * low, len(losses))


def _acceleration(metric: Callable[[RowTerms, Tensor], Tensor], rows: RowTerms) -> float:
    """A sixth of the skewness of a metric's estimate, from leaving out groups of rows."""
    num_rows = len(rows.nll)
    groups = min(num_rows, _JACKKNIFE_GROUPS)
    group_of = torch.arange(num_rows) % groups
    block = max(1, _BLOCK // num_rows)
    values = []
    for start in range(0, groups, block):
        left_out = torch.arange(start, min(start + block, groups))
        values.append(metric(rows, (group_of != left_out[:, None]).double()))
    estimates = torch.cat(values)
    deviations = estimates.mean() - estimates
    scale = deviations.square().sum().item() ** 1.5
    return deviations.pow(3).sum().item() / (6 * scale) if scale else 0.0


def _aurc_interval(rows: RowTerms, replicates: Tensor) -> Interval:
    """The BCa interval of AURC from its values on R resamples; none with too few wrong or right."""
    metric = METRICS["aurc"]
    num_rows = len(rows.nll)
    value = metric(rows, rows.ones).item()
    right = int(rows.correct.sum())
    if min(right, num_rows - right) < _FEWEST:
        return Interval(value, None, None, num_rows)
    below = ((replicates < value).double() + (replicates == value).double() / 2).mean().item()
    least = 0.5 / len(replicates)
    bias = _NORMAL.inv_cdf(min(max(below, least), 1 - least))
    acceleration = _acceleration(metric, rows)
    ends = []
    for tail in _TAILS:
        z = bias + _NORMAL.inv_cdf(tail)
        ends.append(_NORMAL.cdf(bias + z / (1 - acceleration * z)))
    return Interval(value, *_quantiles(replicates, *ends), num_rows)


def calibrated_level(
    probabilities: Tensor, labels: Tensor, bins: Bins = DEFAULT_BINS
) -> CalibratedLevel:
    """The ECE that a perfectly calibrated model with the same confidences would have.

    Labels are redrawn from the confidences a thousand times: p = (1 + #{ECE* ≥ ECE})/1001.

    Args:
        probabilities: (N, C).
        labels: (N,); only the observed ECE depends on them.
        bins: of ECE.

    >>> p = torch.tensor([[0.7, 0.3]] * 10)
    >>> level = calibrated_level(p, torch.tensor([0] * 7 + [1] * 3))
    >>> level.p_value, round(level.value, 2)
    (1.0, 0.11)

    Reference: Bröcker, Smith (2007), https://doi.org/10.1175/WAF993.1
    """
    return _level_of(RowTerms.of(probabilities, labels, bins))


def _level_of(rows: RowTerms) -> CalibratedLevel:
    observed = METRICS["ece"](rows, rows.ones).item()
    scores = calibrated_scores(rows)
    reached = int((scores >= observed - 1e-12).sum())  # equal but for rounding is reached
    low, high = _quantiles(scores, 0.05, 0.95)
    p_value = (1 + reached) / (1 + len(scores))
    return CalibratedLevel(scores.mean().item(), low, high, len(rows.nll), p_value)


def summarise(
    probabilities: Tensor,
    labels: Tensor,
    bins: Bins = DEFAULT_BINS,
    resamples: int = 1000,
    losses: Tensor | None = None,
) -> dict[str, Interval]:
    """All metrics with their 95 % intervals; an interval's ends are None where it has none.

    Accuracy has the mid-p Clopper–Pearson interval, NLL and Brier score the bootstrap-t, AURC the
    BCa bootstrap, ECE one of its own and beside it what a calibrated model would score.

    Args:
        probabilities: (N, C).
        labels: (N,).
        bins: of ECE.
        resamples: R.
        losses: (N,), −log p_{i, y_i} in nats, if known more exactly than `probabilities` are.

    Returns:
        Intervals of accuracy, nll, brier, ece and aurc, and `ece_if_calibrated`, a
        `CalibratedLevel`.

    >>> summarise(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1]))["accuracy"]
    Interval(value=1.0, low=0.2236..., high=1.0, n=2)

    Reference: Efron, Tibshirani (1993), https://doi.org/10.1201/9780429246593
    """
    rows = RowTerms.of(probabilities, labels, bins, losses)
    num_rows = len(rows.nll)

    def statistics(weights: Tensor) -> Tensor:
        means = [_studentised(rows.nll, weights), _studentised(rows.brier, weights)]
        return torch.stack([*means, METRICS["aurc"](rows, weights)])

    nll, brier, aurc = resampled(statistics, num_rows, resamples)
    right = int(rows.correct.sum())
    ece = METRICS["ece"](rows, rows.ones).item()
    return {
        "accuracy": Interval(right / num_rows, *share_interval(right, num_rows, LEVEL), num_rows),
        "nll": _mean_interval(rows.nll, nll),
        "brier": _mean_interval(rows.brier, brier),
        "ece": Interval(ece, *ece_interval(rows, ece), num_rows),
        "ece_if_calibrated": _level_of(rows),
        "aurc": _aurc_interval(rows, aurc),
    }


def paired_bootstrap(
    first: Tensor, second: Tensor, labels: Tensor, metric: str = "nll", resamples: int = 1000
) -> PairedDifference:
    """The difference of a metric between two methods; each resample has the same rows of both.

    d = metric(first) − metric(second), and p = (1 + #{|d*_r − d| ≥ |d|})/(1 + R). A difference of
    ECEs has no valid interval or p-value, because between two calibrated models it is about 0 only
    if they are equally sharp.

    Args:
        first: probabilities (N, C), or (K, N, C) of K runs, whose metrics are averaged. Rows are
            resampled, runs are not.
        second: those of the other method, the same rows in the same order and as many runs.
        labels: (N,).
        metric: "accuracy", "nll", "brier" or "aurc".
        resamples: R.

    Returns:
        d in the metric's unit; its 95 % interval, by percentiles, for accuracy the normal one with
        two rows added, one for each method; and p, two-sided, at least 1/(1 + R).

    >>> sure = torch.tensor([[0.9, 0.1]]).repeat(9, 1)
    >>> unsure = torch.tensor([[0.6, 0.4]]).repeat(9, 1)
    >>> paired_bootstrap(sure, unsure, torch.zeros(9, dtype=torch.long)).difference
    -0.4054...

    References:
        Davison, Hinkley (1997), ch. 4, https://doi.org/10.1017/CBO9780511802843; Bonett, Price
        (2012), https://doi.org/10.3102/1076998611411915
    """
    if metric in ("ece", "ece_debiased"):
        expected = f"one of {COMPARED}: no interval of its differences covers"
        raise Refusal(f"got metric {metric!r}; expected {expected}; use `calibrated_level` of each")
    if metric not in COMPARED:
        raise Refusal(f"got metric {metric!r}; expected one of {COMPARED}; choose one")
    stacked = first.ndim == second.ndim == 3
    if stacked and len(first) != len(second):
        got = f"{len(first)} and {len(second)} runs"
        raise Refusal(f"got {got}; expected as many of both; compare runs that both have")
    runs = zip(first, second, strict=True) if stacked else [(first, second)]
    pairs = [(RowTerms.of(a, labels), RowTerms.of(b, labels)) for a, b in runs]
    value = METRICS[metric]

    def difference(weights: Tensor) -> Tensor:
        return torch.stack([value(a, weights) - value(b, weights) for a, b in pairs]).mean(0)[None]

    d = difference(pairs[0][0].ones).item()
    replicates = resampled(difference, len(labels), resamples)[0]
    is_extreme = (replicates - d).abs() >= abs(d) - 1e-12  # equal but for rounding is extreme
    p_value = (1 + int(is_extreme.sum())) / (1 + resamples)
    if metric == "accuracy":
        by_row = torch.stack([a.correct - b.correct for a, b in pairs]).mean(0)
        low, high = _share_difference(by_row)
    else:
        low, high = _quantiles(replicates, *_TAILS)
    return PairedDifference(d, low, high, p_value, len(labels))


def _share_difference(differences: Tensor) -> tuple[float, float]:
    """The normal interval of a mean of differences in [−1, 1], after adding one of 1 and one of −1.

    The two keep the interval from having no width where the methods agree on every row.
    """
    more = torch.cat([differences, differences.new_tensor([1.0, -1.0])])
    mean = more.mean().item()
    half = _NORMAL.inv_cdf(_TAILS[1]) * more.std(correction=0).item() / len(more) ** 0.5
    return max(-1.0, mean - half), min(1.0, mean + half)
