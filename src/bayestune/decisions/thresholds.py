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

_ROUNDING = 1e-5  # of a score in float32, as a part of it, between batches of other rows
_STEPS = 20  # thresholds of a sequence: more are passed by none, fewer lose coverage


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
    """Thresholds λ (m,) from the strictest on, and rows and losses at or below each, (m,)."""

    values: Tensor
    rows: Tensor
    losses: Tensor

    def passed(self, promise: Promise, *, bounded: bool) -> int:
        """How many thresholds keep the promise before the first that does not."""
        pairs = zip(self.losses.tolist(), self.rows.tolist(), strict=True)
        for place, (losses, rows) in enumerate(pairs):
            if not promise.kept_at(p_value(losses, rows, promise.risk, bounded=bounded)):
                return place
        return len(self.rows)


def _sequence(scores: Tensor, losses: Tensor, start: int) -> _Sequence:
    """Thresholds that act on about `start` rows and more; infinite scores never act.

    A score is known up to the rounding of a pass, which depends on the batch that a row is in. So
    each λ lies in the middle of a gap between two rows, the widest of those nearby: no row that it
    was found on is moved across it by rounding. No label is looked at, which the promise needs.
    """
    order = scores.sort()
    ranked = order.values[order.values.isfinite()]
    counts = torch.linspace(start, len(ranked), _STEPS, dtype=torch.float64).round().long().unique()
    ends = torch.cat([ranked, _beyond(ranked)[None]])
    places = torch.tensor(_wide_gaps(ends.diff(), counts.tolist()))
    values = torch.lerp(ends[places], ends[places + 1], 0.5).unique()
    rows = torch.searchsorted(ranked, values, right=True)
    return _Sequence(values, rows, losses[order.indices].cumsum(0)[rows - 1])


def _beyond(ranked: Tensor) -> Tensor:
    """Where a row after the last would be: a mean gap further, at least what rounding can do."""
    last = ranked[-1]
    mean_gap = (last - ranked[0]) / max(1, len(ranked) - 1)
    return last + mean_gap.clamp_min(_ROUNDING * last.abs().clamp_min(1).item())


def _wide_gaps(gaps: Tensor, counts: Sequence[int]) -> list[int]:
    """For each number of rows the widest gap behind that many or a few more, the first of equals.

    Gap i lies between row i and the next one; equal scores have none between them.
    """
    widths = gaps.tolist()
    step = (counts[-1] - counts[0]) // max(1, len(counts) - 1)
    nearby = max(2, step // 4)
    found = []
    for count in counts:
        place = max(range(count - 1, min(count - 1 + nearby, len(widths))), key=widths.__getitem__)
        while widths[place] == 0:  # the last gap is wider than that
            place += 1
        found.append(place)
    return found


def checked(scores: Tensor, losses: Tensor, *, bounded: bool) -> tuple[Tensor, Tensor]:
    """Scores and losses in float64; refuses what cannot be ranked or is no loss."""
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
    values, sums = checked(scores, losses, bounded=bounded)
    check_enough(len(values), promise)
    return last_kept(values, sums, promise, start, bounded=bounded)


def last_kept(
    scores: Tensor, losses: Tensor, promise: Promise, start: int | None, *, bounded: bool
) -> Threshold:
    """The last threshold kept of checked scores and losses; none if there are too few rows."""
    num_rows = len(scores)
    nothing = Threshold(None, promise.risk, promise.confidence, num_rows, 0, 0.0, 1.0)
    fewest = rows_needed(promise)
    finite = int(scores.isfinite().sum())
    if finite < fewest:
        lost = scores.isfinite().double().dot(losses).item()
        supported = risk_bound(lost, finite, promise.confidence, bounded=bounded)
        needed = rows_for_rate(lost / max(1, finite), promise)
        return replace(nothing, supported=supported, needed=needed)
    first = min(max(fewest, start or 0), finite)
    sequence = _sequence(scores, losses, first)
    strictest = (sequence.losses[0].item(), int(sequence.rows[0]))
    supported = risk_bound(*strictest, promise.confidence, bounded=bounded)
    needed = rows_for_rate(strictest[0] / strictest[1], promise)
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
    """Where to begin on `rows` other rows: at the coverage that is most likely to pass.

    A sequence that begins at the fewest rows fails at the first error among them; one that begins
    later has rows to spare. The risk at each coverage is estimated on these rows, which must not be
    those that the threshold is then chosen on.

    Args:
        scores: (N,) of rows on which one may choose, of a class perhaps none.
        losses: (N,), in [0, 1].
        rows: n of the rows for the threshold.
        promise: what they must keep.
    """
    fewest = rows_needed(promise)
    if len(scores) == 0:
        return fewest
    values, sums = checked(scores, losses, bounded=True)
    finite = int(values.isfinite().sum())
    if finite == 0 or rows <= fewest:
        return fewest
    cumulative = sums[values.argsort(stable=True)].cumsum(0)
    least = math.ceil(fewest / rows * len(values))
    found = {fewest: 1.0}
    for place in torch.linspace(min(least, finite), finite, _STEPS).round().int().tolist():
        # As many rows may lie below a score here as a few more there: two samples differ by that.
        spread = math.sqrt(2 * place * (1 - place / len(values)))
        later = min(finite, place + round(spread))
        # Half an error more: an estimate of 0 would say that the fewest rows always pass.
        rate = (cumulative[later - 1].item() + 0.5) / (later + 1)
        taken = place * rows // len(values)
        found[taken] = bounded_loss_p_value(rate * taken, taken, promise.risk)
    return max(fewest, min(found, key=found.__getitem__))
