"""The ECE of a calibrated model, and an interval of ECE that covers its true value.

The ECE of a calibrated model is not 0, because each bin's accuracy is of finitely many rows, and a
bootstrap resample adds as much noise again. So where calibration is good, the plain percentile
interval hardly ever covers the true value; docs/intervals.md has the coverage of the one here.
"""

import torch
from torch import Tensor

from bayestune.metrics.proportions import share_interval
from bayestune.metrics.scores import RowTerms

_BLOCK = 2**21  # numbers in one block of redrawn labels: 16 MiB
_REDRAWN = 1000  # sets of labels of a calibrated model
_TRIED = 16  # strengths t of miscalibration
_STRONGEST = 2.0  # the largest t, in multiples of each bin's observed gap
_PER_STRENGTH = 300  # resamples for each t
_TAIL = 0.02  # of either side
_ROUNDING = 1e-12


def _eces(bins: Tensor, gaps: Tensor, num_bins: int) -> Tensor:
    """ECEs (R,) of R sets of N rows.

    Args:
        bins: the bin of each row, (R, N).
        gaps: correctness less confidence of each row, (R, N).
        num_bins: B.
    """
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
    scores = []
    for start in range(0, redrawn, block):
        size = (min(block, redrawn - start), num_rows)
        uniform = torch.rand(size, generator=generator, dtype=torch.float64)
        gaps = (uniform < rows.confidence).double() - rows.confidence
        scores.append(_eces(rows.bin.expand(size), gaps, num_bins))
    return torch.cat(scores)


def ece_interval(rows: RowTerms, observed: float) -> tuple[float, float]:
    """An interval of the ECE that infinitely many such rows would have.

    It is the union of four. (1) An inverted test: for each t from 0 (calibrated) to 2, rows are
    resampled and correctness is redrawn with probability confidence + t·(the bin's observed gap). A
    t is kept unless the observed ECE lies in a tail of 2 % of the ECEs under t. (2) The basic
    bootstrap, 2·observed − the 2 % quantiles of resampled rows, at least 0. (3) The observed value,
    which is biased upwards and can lie above (1) and (2). (4) The distance from the mean confidence
    to either end of accuracy's interval: no ECE is below |accuracy − mean confidence|, and (1) and
    (2) do not reach that far where nearly all rows share a bin whose gap is small by chance.

    Args:
        rows: what the metrics need of N rows.
        observed: their ECE.

    Returns:
        Low and high.
    """
    num_bins = int(rows.bin.max()) + 1
    errors = rows.correct - rows.confidence
    sizes = torch.bincount(rows.bin).clamp(min=1)
    bin_gaps = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, rows.bin, errors) / sizes
    gap = bin_gaps[rows.bin]  # of each row's bin, (N,)
    strengths = torch.linspace(0, _STRONGEST, _TRIED, dtype=torch.float64)
    accuracies = (rows.confidence + strengths[:, None] * gap).clamp(0, 1)  # under each t, (T, N)
    truths = _eces(rows.bin.expand_as(accuracies), accuracies - rows.confidence, num_bins)
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

    All t share the resampled rows and the uniform numbers u, so that neighbouring t differ little.
    A row is right where confidence + t·gap > u, so over t its correctness flips at most once: to
    right, or to wrong where the gap is below 0. A bin's Σ (correctness − confidence) at each t is
    therefore its sum before any flip plus the running sum of the flips so far.
    """
    generator = torch.Generator().manual_seed(1)
    num_rows = len(rows.bin)
    block = max(1, _BLOCK // num_rows)
    step = _STRONGEST / (_TRIED - 1)
    right_before_flip = torch.where(gap < 0, 1.0, 0.0)
    redrawn = []
    resampled = []
    for start in range(0, _PER_STRENGTH, block):
        size = (min(block, _PER_STRENGTH - start), num_rows)
        chosen = torch.randint(num_rows, size, generator=generator)
        uniform = torch.rand(size, generator=generator, dtype=torch.float64)
        bins = rows.bin[chosen]
        errors = (rows.correct - rows.confidence)[chosen]
        resampled.append(_eces(bins, errors, num_bins))
        # the first t, as its number, at which a row has flipped; T if it never does
        flip = ((uniform - rows.confidence[chosen]) / (gap[chosen] * step)).nan_to_num(nan=0.0)
        flip = torch.where(gap[chosen] < 0, flip.ceil(), flip.floor() + 1)
        cells = flip.clamp(0, _TRIED).long() * num_bins + bins  # of a table (T + 1, B), flattened
        change = torch.where(gap < 0, -1.0, 1.0).double()[chosen]
        flips = change.new_zeros(size[0], (_TRIED + 1) * num_bins).scatter_add_(1, cells, change)
        so_far = flips.view(size[0], _TRIED + 1, num_bins)[:, :_TRIED].cumsum(1)
        error_before = (right_before_flip - rows.confidence)[chosen]
        before = so_far.new_zeros(size[0], num_bins).scatter_add_(1, bins, error_before)
        redrawn.append((so_far + before[:, None]).abs().sum(2).T / num_rows)
    return torch.cat(redrawn, 1), torch.cat(resampled)
