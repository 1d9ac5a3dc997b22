"""What ECE says and what it does not: the score of a calibrated model, and an interval that covers.

ECE of a calibrated model is not 0, because each bin's accuracy is of finitely many rows, and a
bootstrap resample adds as much noise again. So the plain percentile interval covers the true value
hardly ever where calibration is good; docs/intervals.md has the coverage of what is used here.
"""

import torch
from torch import Tensor

from bayestune.metrics.proportions import share_interval
from bayestune.metrics.scores import RowTerms

_BLOCK = 2**21  # numbers in one block of redrawn labels: 16 MiB
_REDRAWN = 1000  # sets of labels of a calibrated model
_TRIED = 16  # strengths of miscalibration
_STRONGEST = 2.0  # times the observed gap of each bin
_PER_STRENGTH = 300
_TAIL = 0.02  # of either side
_ROUNDING = 1e-12


def _eces(bins: Tensor, gaps: Tensor, num_bins: int) -> Tensor:
    """ECE (R,) of R sets of N rows by their bins and gaps, correctness less confidence, (R, N)."""
    sums = gaps.new_zeros(len(gaps), num_bins).scatter_add_(1, bins, gaps)
    return sums.abs().sum(1) / gaps.shape[1]


def calibrated_scores(rows: RowTerms, redrawn: int = _REDRAWN) -> Tensor:
    """ECEs (R,) of a calibrated model with these confidences: rows held, correctness redrawn.

    Reference: Bröcker, Smith (2007), https://doi.org/10.1175/WAF993.1
    """
    generator = torch.Generator().manual_seed(0)
    num_rows = len(rows.bin)
    num_bins = int(rows.bin.max()) + 1
    block = max(1, _BLOCK // num_rows)
    found = []
    for start in range(0, redrawn, block):
        size = (min(block, redrawn - start), num_rows)
        uniform = torch.rand(size, generator=generator, dtype=torch.float64)
        gaps = (uniform < rows.confidence).double() - rows.confidence
        found.append(_eces(rows.bin.expand(size), gaps, num_bins))
    return torch.cat(found)


def ece_interval(rows: RowTerms, observed: float) -> tuple[float, float]:
    """An interval of the ECE that infinitely many such rows would have.

    It is the union of four. (1) A test inverted: rows are resampled, and correctness is redrawn
    with probability confidence + t·(the bin's observed gap), t from 0, calibrated, to 2; each t is
    kept whose ECEs do not leave the observed one in a tail of 2 %. (2) The basic bootstrap,
    2·observed − the 2 % quantiles of resampled rows, at least 0. (3) The observed value, which is
    biased upwards and can lie above (1) and (2). (4) The distance from the mean confidence to
    either end of accuracy's interval: no ECE is below |accuracy − mean confidence|, and where
    nearly all rows share a bin whose gap is small by chance, (1) and (2) do not look beyond it.

    Args:
        rows: what the metrics need of N rows.
        observed: their ECE.

    Returns:
        Low and high.
    """
    num_bins = int(rows.bin.max()) + 1
    errors = rows.correct - rows.confidence
    sizes = torch.bincount(rows.bin).clamp(min=1)
    gaps = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, rows.bin, errors) / sizes
    gap = gaps[rows.bin]
    strengths = torch.linspace(0, _STRONGEST, _TRIED, dtype=torch.float64)
    tried = (rows.confidence + strengths[:, None] * gap).clamp(0, 1)
    truths = _eces(rows.bin.expand_as(tried), tried - rows.confidence, num_bins)
    redrawn, resampled = _redrawn(rows, gap, num_bins)
    above = (redrawn >= observed - _ROUNDING).double().mean(1)
    below = (redrawn <= observed + _ROUNDING).double().mean(1)
    kept = truths[(above > _TAIL) & (below > _TAIL)].tolist()
    tails = resampled.new_tensor([1 - _TAIL, _TAIL])
    basic = (2 * observed - torch.quantile(resampled, tails)).clamp(min=0).tolist()
    ends = [observed, *basic, *kept]
    shares = share_interval(int(rows.correct.sum()), len(rows.bin), 0.95)
    mean = rows.confidence.mean().item()
    return min(ends), max(*ends, *(abs(share - mean) for share in shares))


def _redrawn(rows: RowTerms, gap: Tensor, num_bins: int) -> tuple[Tensor, Tensor]:
    """ECEs of resampled rows: with redrawn correctness for each t (T, R), and with their own (R,).

    All t share the resampled rows and the uniform numbers u, so that one differs little from the
    next, and a row is told once: it is right where confidence + t·gap > u, that is from some t on,
    or up to it where the gap is below 0.
    """
    generator = torch.Generator().manual_seed(1)
    num_rows = len(rows.bin)
    block = max(1, _BLOCK // num_rows)
    step = _STRONGEST / (_TRIED - 1)
    starts = torch.where(gap < 0, 1.0, 0.0)  # right at t = 0 less, or none
    redrawn = []
    resampled = []
    for start in range(0, _PER_STRENGTH, block):
        size = (min(block, _PER_STRENGTH - start), num_rows)
        drawn = torch.randint(num_rows, size, generator=generator)
        uniform = torch.rand(size, generator=generator, dtype=torch.float64)
        bins = rows.bin[drawn]
        errors = (rows.correct - rows.confidence)[drawn]
        resampled.append(_eces(bins, errors, num_bins))
        place = ((uniform - rows.confidence[drawn]) / (gap[drawn] * step)).nan_to_num(nan=0.0)
        place = torch.where(gap[drawn] < 0, place.ceil(), place.floor() + 1)
        turns = place.clamp(0, _TRIED).long() * num_bins + bins
        change = torch.where(gap < 0, -1.0, 1.0).double()[drawn]
        turned = change.new_zeros(size[0], (_TRIED + 1) * num_bins).scatter_add_(1, turns, change)
        right = turned.view(size[0], _TRIED + 1, num_bins)[:, :_TRIED].cumsum(1)
        offset = (starts - rows.confidence)[drawn]
        base = right.new_zeros(size[0], num_bins).scatter_add_(1, bins, offset)
        redrawn.append((right + base[:, None]).abs().sum(2).T / num_rows)
    return torch.cat(redrawn, 1), torch.cat(resampled)
