"""Thresholds on a score, with a promise about the rows acted on: R(λ) = E[loss | score ≤ λ] ≤ α.

Fixed-sequence testing (Learn then Test; Angelopoulos et al. 2021, section 4.2): thresholds
λ_1 < λ_2 < … act on fixed numbers of rows, which is to say that they are quantiles of the score and
never depend on a label. From the strictest on, each is kept while the p-value of R(λ) > α is at
most δ: the binomial tail of Geifman and El-Yaniv (2017) for errors, Hoeffding–Bentkus for costs.
The last one kept is λ̂, and P(R(λ̂) ≤ α) ≥ 1 − δ over the held-out rows: tests stop at the first
failure, so one false λ must be passed to break the promise, and δ need not be divided.

It holds for one score chosen beforehand, on rows that nothing else was chosen on. Because the λ are
quantiles of these rows, it is exact where R(λ) crosses α once as λ grows, which a score of any use
does; studies/decisions.py measures it without that.

References:
    Angelopoulos et al. (2021), https://arxiv.org/abs/2110.01052; Geifman, El-Yaniv (2017),
    https://arxiv.org/abs/1705.08500.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayestune.decisions.bounds import (
    Promise,
    bounded_loss_p_value,
    p_value,
    risk_bound,
    rows_for_rate,
    rows_needed,
    smallest_risk,
)
from bayestune.errors import Refusal

_ROUNDING = 1e-5  # by which a float32 score differs between batches, as a share of the score
_STEPS = 20  # thresholds of a sequence: with fewer, coverage is lost; more gain nothing


@dataclass(frozen=True)
class Threshold:
    """The largest λ that keeps a promise, and what it was found on.

    Args:
        value: λ̂; None if even the strictest fails, and then nothing is acted on.
        risk: α of the promise.
        confidence: 1 − δ of the promise.
        rows: n, the held-out rows.
        acted: how many of them have a score of at most λ̂.
        losses: the sum of their losses: their errors, if errors have no costs.
        supported: the smallest risk that the strictest threshold can promise on these rows, with
            the same confidence.
        needed: how many rows acted on suffice for the promise, at the loss of the strictest
            threshold; None if that is as great as the risk.
    """

    value: float | None
    risk: float
    confidence: float
    rows: int
    acted: int
    losses: float
    supported: float
    needed: int | None = None

    @property
    def coverage(self) -> float:
        """The share of the held-out rows that is acted on."""
        return self.acted / max(1, self.rows)

    def acts(self, scores: Tensor) -> Tensor:
        """Which rows are acted on, (N,) bool: those with a score of at most λ̂."""
        if self.value is None:
            return torch.zeros_like(scores, dtype=torch.bool)
        return scores <= self.value

    def sentence(self) -> str:
        """What is promised, or why nothing is, in one sentence."""
        if self.value is None:
            return (
                f"no threshold keeps the risk at {self.risk:g} with confidence "
                f"{self.confidence:g} on {self.rows} rows: nothing is acted on; the smallest risk "
                f"they support is {self.supported:.3f}; {self._need()}"
            )
        return (
            f"acts on {self.acted} of {self.rows} rows; risk at most {self.risk:g} with "
            f"confidence {self.confidence:g}"
        )

    def _need(self) -> str:
        if self.needed is None:
            return "no number of rows would, at the error rate of the surest ones"
        return f"{self.needed} rows acted on would, at the error rate of the surest ones"


@dataclass(frozen=True, eq=False)
class _Sequence:
    """Thresholds in rising order.

    Args:
        values: λ (m,).
        rows: how many rows have a score of at most each λ, (m,).
        losses: the sum of these rows' losses, (m,).
    """

    values: Tensor
    rows: Tensor
    losses: Tensor

    def passed(self, promise: Promise, *, bounded: bool) -> int:
        """How many thresholds keep the promise before the first that does not."""
        pairs = zip(self.losses.tolist(), self.rows.tolist(), strict=True)
        for index, (losses, rows) in enumerate(pairs):
            if not promise.kept_at(p_value(losses, rows, promise.risk, bounded=bounded)):
                return index
        return len(self.rows)


def _sequence(scores: Tensor, losses: Tensor, start: int) -> _Sequence:
    """Thresholds that act on about `start` rows, and on more up to all; infinite scores never act.

    A score is known up to the rounding of a pass, which depends on the batch that a row is in. So
    each λ lies in the middle of a gap between two rows, the widest of those nearby: rounding moves
    no row that it was found on across it. No label is looked at; the promise needs that.
    """
    by_score = scores.sort()
    ranked = by_score.values[by_score.values.isfinite()]
    counts = torch.linspace(start, len(ranked), _STEPS, dtype=torch.float64).round().long().unique()
    ends = torch.cat([ranked, _after_last(ranked)[None]])
    gaps = torch.tensor(_wide_gaps(ends.diff(), counts.tolist()))
    values = torch.lerp(ends[gaps], ends[gaps + 1], 0.5).unique()
    rows = torch.searchsorted(ranked, values, right=True)
    return _Sequence(values, rows, losses[by_score.indices].cumsum(0)[rows - 1])


def _after_last(ranked: Tensor) -> Tensor:
    """The score of a further row, (): a mean gap above the last, at least what rounding can do."""
    last = ranked[-1]
    mean_gap = (last - ranked[0]) / max(1, len(ranked) - 1)
    return last + mean_gap.clamp_min(_ROUNDING * last.abs().clamp_min(1).item())


def _wide_gaps(gaps: Tensor, counts: Sequence[int]) -> list[int]:
    """For each count the index of the widest gap behind as many rows or a few more.

    Gap i lies between row i and row i + 1. Of gaps of one width it is the first; if all have width
    0, as between equal scores, the next that has any. The last one has a width.
    """
    widths = gaps.tolist()
    step = (counts[-1] - counts[0]) // max(1, len(counts) - 1)
    nearby = max(2, step // 4)
    indices = []
    for count in counts:
        first = count - 1
        candidates = range(first, min(first + nearby, len(widths)))
        index = max(candidates, key=widths.__getitem__)
        while widths[index] == 0:  # ends, because the last gap has a width
            index += 1
        indices.append(index)
    return indices


def checked(scores: Tensor, losses: Tensor, *, bounded: bool) -> tuple[Tensor, Tensor]:
    """Scores and losses in float64 on the CPU; refuses NaN scores and losses out of range."""
    if scores.ndim != 1 or losses.shape != scores.shape or len(scores) == 0:
        got = f"scores and losses of shapes {tuple(scores.shape)} and {tuple(losses.shape)}"
        raise Refusal(f"got {got}; expected (N,) and (N,), not empty; give one of each a row")
    values = losses.detach().cpu().double()
    allowed = (values >= 0) & (values <= 1) if bounded else (values == 0) | (values == 1)
    if scores.isnan().any() or not allowed.all():
        expected = "losses from 0 to 1" if bounded else "0 or 1 (costs: bounded=True)"
        raise Refusal(f"got NaN scores or other losses; expected {expected}; scale the costs")
    return scores.detach().cpu().double(), values


def check_enough(rows: int, promise: Promise, share: float = 1.0) -> None:
    """Refuses a promise that so many rows can never support, whatever the model.

    Args:
        rows: n, those that thresholds are chosen on.
        promise: what is asked.
        share: of all held-out rows that these are.
    """
    needed = rows_needed(promise)
    if rows < needed:
        total = -int(-needed // share)
        least = math.ceil(1000 * smallest_risk(rows, promise.confidence)) / 1000
        raise Refusal(
            f"got {rows} rows to choose thresholds on; expected {needed} or more for a risk of "
            f"{promise.risk:g} with confidence {promise.confidence:g}: give {total} held-out rows "
            f"in all, or ask for {least:.3f}, the smallest risk "
            "that these can support without a single error"
        )


def threshold(
    scores: Tensor,
    losses: Tensor,
    promise: Promise,
    start: int | None = None,
    *,
    bounded: bool = False,
) -> Threshold:
    """The largest λ of a fixed sequence that keeps a promise.

    Args:
        scores: (N,), acted on where small; +inf is never acted on.
        losses: (N,), 1 where the choice is wrong and 0 elsewhere, or costs in [0, 1].
        promise: α and 1 − δ.
        start: how many rows the strictest threshold acts on, decided without these losses; the
            fewest that can keep the promise unless given (see `likely_start`).
        bounded: whether losses may lie between 0 and 1, as costs do; the bound is then wider.

    Raises:
        Refusal: if there are fewer rows than the promise needs without any error.

    >>> scores = torch.arange(100.0)
    >>> found = threshold(scores, (scores >= 80).double(), Promise(0.05, 0.9))
    >>> found.acted, found.losses, round(found.supported, 3)
    (80, 0.0, 0.05)
    """
    scores, losses = checked(scores, losses, bounded=bounded)
    check_enough(len(scores), promise)
    return last_kept(scores, losses, promise, start, bounded=bounded)


def last_kept(
    scores: Tensor, losses: Tensor, promise: Promise, start: int | None, *, bounded: bool
) -> Threshold:
    """The last threshold of the sequence before the first that breaks the promise.

    It has no value if the first breaks it, or if there are too few rows. Scores and losses are as
    `checked` returns them, all else is as in `threshold`.
    """
    num_rows = len(scores)
    nothing = Threshold(None, promise.risk, promise.confidence, num_rows, 0, 0.0, 1.0)
    fewest = rows_needed(promise)
    num_finite = int(scores.isfinite().sum())
    if num_finite < fewest:
        loss = scores.isfinite().double().dot(losses).item()
        supported = risk_bound(loss, num_finite, promise.confidence, bounded=bounded)
        needed = rows_for_rate(loss / max(1, num_finite), promise)
        return replace(nothing, supported=supported, needed=needed)
    sequence = _sequence(scores, losses, min(max(fewest, start or 0), num_finite))
    strictest_loss = sequence.losses[0].item()
    strictest_rows = int(sequence.rows[0])
    supported = risk_bound(strictest_loss, strictest_rows, promise.confidence, bounded=bounded)
    needed = rows_for_rate(strictest_loss / strictest_rows, promise)
    nothing = replace(nothing, supported=supported, needed=needed)
    passed = sequence.passed(promise, bounded=bounded)
    if passed == 0:
        return nothing
    last = passed - 1
    return replace(
        nothing,
        value=sequence.values[last].item(),
        acted=int(sequence.rows[last]),
        losses=sequence.losses[last].item(),
    )


def likely_start(scores: Tensor, losses: Tensor, rows: int, promise: Promise) -> int:
    """How many rows the strictest threshold should act on, to be most likely to keep a promise.

    A sequence that begins at the fewest rows fails at the first error among them; one that begins
    later has rows to spare. The risk at each coverage is estimated on rows for choices, which must
    not be those that the threshold is then chosen on.

    Args:
        scores: (N,) of the rows for choices; of a class there may be none.
        losses: (N,), in [0, 1].
        rows: n, how many rows the threshold is to be chosen on.
        promise: what they must keep.
    """
    fewest = rows_needed(promise)
    if len(scores) == 0:
        return fewest
    scores, losses = checked(scores, losses, bounded=True)
    num_rows = len(scores)
    num_finite = int(scores.isfinite().sum())
    if num_finite == 0 or rows <= fewest:
        return fewest
    cumulative = losses[scores.argsort(stable=True)].cumsum(0)
    least = min(math.ceil(fewest / rows * num_rows), num_finite)
    p_values = {fewest: 1.0}  # estimated, by the number of rows acted on
    for count in torch.linspace(least, num_finite, _STEPS).round().int().tolist():
        # Two samples differ: among the other rows, those of a `count` may reach as far as a few
        # more do here.
        spread = math.sqrt(2 * count * (1 - count / num_rows))
        later = min(num_finite, count + round(spread))
        # Half an error more: an estimate of 0 would say that the fewest rows always pass.
        rate = (cumulative[later - 1].item() + 0.5) / (later + 1)
        acted = count * rows // num_rows
        p_values[acted] = bounded_loss_p_value(rate * acted, acted, promise.risk)
    return max(fewest, min(p_values, key=p_values.__getitem__))
