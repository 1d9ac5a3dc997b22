"""Bootstrap over rows: intervals of metrics, and whether two methods differ by more than chance.

The R resamples are the same in every call with as many rows. Refusal is raised on bad rows,
unequal numbers of runs, an unknown metric, and without resamples.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayestune.errors import Refusal
from bayestune.metrics.scores import DEFAULT_BINS, METRICS, Bins, RowTerms

LEVEL = 0.95
_BLOCK = 2**21  # numbers in one block of resamples: 16 MiB


@dataclass(frozen=True)
class Interval:
    """A metric's value on `n` rows and its bootstrap interval, in the metric's unit."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """First minus second on `n` rows, its interval, and the two-sided p-value of no difference."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int


def _resampled(
    statistic: Callable[[Tensor], Tensor], num_rows: int, resamples: int
) -> tuple[Tensor, list[list[float]]]:
    """M statistics of counts (R, N) on all resamples: values (M, R), M low ends, M high ends."""
    if resamples < 1:
        raise Refusal(f"got resamples={resamples}; expected 1 or more; 1000 is customary")
    generator = torch.Generator().manual_seed(0)
    block = max(1, _BLOCK // num_rows)
    blocks = []
    for start in range(0, resamples, block):
        size = (min(block, resamples - start), num_rows)
        drawn = torch.randint(num_rows, size, generator=generator)
        counts = torch.zeros_like(drawn).scatter_add_(1, drawn, torch.ones_like(drawn))
        blocks.append(statistic(counts.double()))
    values = torch.cat(blocks, 1)
    tails = values.new_tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return values, torch.quantile(values, tails, dim=1).tolist()


def summarise(
    probabilities: Tensor, labels: Tensor, bins: Bins = DEFAULT_BINS, resamples: int = 1000
) -> dict[str, Interval]:
    """All metrics with their 95 % percentile intervals over resampled rows.

    Those of the calibration errors lie high and can exclude the value, because a resample adds
    noise of its own, which counts as miscalibration.

    Args:
        probabilities: (N, C).
        labels: (N,).
        bins: of the calibration errors.
        resamples: R.

    Returns:
        Intervals of accuracy, nll, brier, ece, ece_debiased and aurc.

    >>> summarise(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1]))["accuracy"]
    Interval(value=1.0, low=1.0, high=1.0, n=2)

    Reference: Efron, Tibshirani (1993), https://doi.org/10.1201/9780429246593
    """
    rows = RowTerms.of(probabilities, labels, bins)

    def statistics(weights: Tensor) -> Tensor:
        return torch.stack([metric(rows, weights) for metric in METRICS.values()])

    _, (low, high) = _resampled(statistics, len(labels), resamples)
    values = statistics(rows.ones)[:, 0].tolist()
    intervals = map(Interval, values, low, high, [len(labels)] * len(METRICS))
    return dict(zip(METRICS, intervals, strict=True))


def paired_bootstrap(
    first: Tensor,
    second: Tensor,
    labels: Tensor,
    metric: str = "nll",
    resamples: int = 1000,
    bins: Bins = DEFAULT_BINS,
) -> PairedDifference:
    """Difference of a metric of two methods, every resample taken of both.

    d = metric(first) − metric(second), and p = (1 + #{|d*_r − d| ≥ |d|})/(1 + R).

    Args:
        first: (N, C), or (K, N, C) for K runs, whose metrics are averaged: the runs are held, the
            rows resampled.
        second: the same rows in the same order, and as many runs.
        labels: (N,).
        metric: a key of what `summarise` returns.
        resamples: R.
        bins: of the calibration errors.

    Returns:
        d in the metric's unit, its 95 % percentile interval, and p, two-sided, at least 1/(1 + R).

    >>> sure = torch.tensor([[0.9, 0.1]]).repeat(9, 1)
    >>> unsure = torch.tensor([[0.6, 0.4]]).repeat(9, 1)
    >>> paired_bootstrap(sure, unsure, torch.zeros(9, dtype=torch.long)).difference
    -0.4054...

    Reference: Davison, Hinkley (1997), ch. 4, https://doi.org/10.1017/CBO9780511802843
    """
    if metric not in METRICS:
        raise Refusal(f"got metric {metric!r}; expected one of {tuple(METRICS)}; choose one")
    stacked = first.ndim == second.ndim == 3
    if stacked and len(first) != len(second):
        got = f"{len(first)} and {len(second)} runs"
        raise Refusal(f"got {got}; expected as many of both; compare runs that both have")
    runs = zip(first, second, strict=True) if stacked else [(first, second)]
    pairs = [(RowTerms.of(a, labels, bins), RowTerms.of(b, labels, bins)) for a, b in runs]
    weigh = METRICS[metric]

    def difference(weights: Tensor) -> Tensor:
        return torch.stack([weigh(a, weights) - weigh(b, weights) for a, b in pairs]).mean(0)[None]

    d = difference(pairs[0][0].ones).item()
    drawn, ((low,), (high,)) = _resampled(difference, len(labels), resamples)
    extreme = int(((drawn - d).abs() >= abs(d) - 1e-12).sum())  # equal but for rounding is extreme
    return PairedDifference(d, low, high, (1 + extreme) / (1 + resamples), len(labels))
