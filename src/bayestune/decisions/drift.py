"""Are new rows like the held-out ones? A two-sample test on scores, and the rows that stick out.

Compare with held-out rows and never with training rows: a model is surer of what it was fitted on,
so training rows always differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bayestune.errors import Refusal
from bayestune.metrics import holm

Scores = Mapping[str, Tensor]
_BLOCK = 2**21  # numbers in one block of permutations


@dataclass(frozen=True)
class Drift:
    """Whether new rows differ from the held-out ones.

    Args:
        p_value: of no difference in any score, Holm's: the smallest times the number of scores.
        statistics: each score's Kolmogorov–Smirnov distance, the largest gap between the shares of
            rows below a value.
        p_values: each score's own, by permutation, adjusted by Holm.
        odd: indices of the new rows that stick out, the oddest first.
        row_p_values: each new row's conformal p-value over the scores, (M,).
    """

    p_value: float
    statistics: dict[str, float]
    p_values: dict[str, float]
    odd: list[int]
    row_p_values: Tensor


def drift_test(
    held_out: Scores, new: Scores, permutations: int = 999, seed: int = 0, odd_share: float = 0.1
) -> Drift:
    """Kolmogorov–Smirnov distances of scores with permutation p-values, Holm over the scores.

    p = (1 + #{permutations with a distance as large})/(1 + R), so that P(p ≤ level) ≤ level if the
    rows are exchangeable, whatever the ties.

    Args:
        held_out: scores of held-out rows by name, (N,) each.
        new: the same scores of new rows, (M,) each.
        permutations: R.
        seed: of the permutations.
        odd_share: the expected share of false ones among the rows that stick out
            (Benjamini–Hochberg over conformal p-values).

    Raises:
        Refusal: if the names differ, there are no rows, or R is too small to show anything.

    >>> same = torch.arange(50.0)
    >>> found = drift_test({"score": same}, {"score": same + 30})
    >>> found.statistics, found.p_value
    ({'score': 0.6}, 0.001)

    References:
        Phipson, Smyth (2010), https://doi.org/10.2202/1544-6115.1585; Holm (1979); rows: Bates et
        al. (2023), https://arxiv.org/abs/2104.08279.
    """
    _check(held_out, new)
    if permutations < 19:
        got = f"permutations={permutations}"
        raise Refusal(f"got {got}; expected 19 or more: p is at least 1/(1 + R); 999 is customary")
    pooled = {name: torch.cat([held_out[name], new[name]]).double() for name in held_out}
    num_held = len(next(iter(held_out.values())))
    raw = {}
    statistics = {}
    for name, both in pooled.items():
        values = _distances(both, num_held, permutations, seed)
        as_large = int((values[1:] >= values[0] - 1e-12).sum())
        raw[name] = (1 + as_large) / (1 + permutations)
        statistics[name] = round(values[0].item(), 12)
    adjusted = holm(raw)
    rows = _row_p_values(held_out, new)
    return Drift(min(adjusted.values()), statistics, adjusted, _odd(rows, odd_share), rows)


def false_alarm_rate(
    held_out: Scores, num_new: int, level: float = 0.05, repetitions: int = 200, seed: int = 0
) -> float:
    """How often the test calls held-out rows different from held-out rows.

    In each repetition `num_new` of the rows, drawn without replacement, play the new ones.

    Raises:
        Refusal: if there are not more rows than `num_new`.
    """
    count = len(next(iter(held_out.values())))
    if not 0 < num_new < count:
        got = f"num_new={num_new} of {count} rows"
        raise Refusal(f"got {got}; expected 1 to {count - 1}; take fewer")
    generator = torch.Generator().manual_seed(seed)
    alarms = 0
    for repetition in range(repetitions):
        order = torch.randperm(count, generator=generator)
        old = {name: values[order[num_new:]] for name, values in held_out.items()}
        drawn = {name: values[order[:num_new]] for name, values in held_out.items()}
        alarms += drift_test(old, drawn, 199, seed + 1 + repetition).p_value <= level
    return alarms / repetitions


def _distances(pooled: Tensor, num_held: int, permutations: int, seed: int) -> Tensor:
    """Distances of the two parts as they are, and of R random ones, (1 + R,)."""
    values, order = pooled.sort()
    ends = torch.cat([values[1:] > values[:-1], torch.ones(1, dtype=torch.bool)])
    count = len(pooled)
    generator = torch.Generator().manual_seed(seed)
    found = [_largest_gaps((order < num_held)[None], num_held, ends)]
    block = max(1, _BLOCK // count)
    for start in range(0, permutations, block):
        size = min(block, permutations - start)
        keys = torch.rand(size, count, generator=generator)
        held = torch.zeros(size, count, dtype=torch.bool)
        held.scatter_(1, keys.topk(num_held, 1, sorted=False).indices, True)
        found.append(_largest_gaps(held, num_held, ends))
    return torch.cat(found)


def _largest_gaps(held: Tensor, num_held: int, ends: Tensor) -> Tensor:
    """max |F_held − F_new| over values, (R,), of flags (R, N) in the order of the values."""
    num_new = held.shape[1] - num_held
    below = held.double().cumsum(1)
    total = torch.arange(1, held.shape[1] + 1, dtype=torch.float64)
    gaps = (below / num_held - (total - below) / num_new).abs()
    return gaps[:, ends].amax(1)


def _row_p_values(held_out: Scores, new: Scores) -> Tensor:
    """(1 + #{held-out rows with as large a score})/(1 + N), least over scores × their number."""
    found = []
    for name, values in held_out.items():
        ordered = values.double().sort().values
        below = torch.searchsorted(ordered, new[name].double())
        found.append((1 + len(ordered) - below) / (1 + len(ordered)))
    return (torch.stack(found).amin(0) * len(found)).clamp_max(1)


def _odd(p_values: Tensor, share: float) -> list[int]:
    """Benjamini and Hochberg: the k smallest, k the last with p_(k) ≤ share · k/M."""
    values, order = p_values.sort(stable=True)
    place = torch.arange(1, len(values) + 1)
    below = (values <= share * place / len(values)).nonzero()
    return order[: int(below.max()) + 1].tolist() if len(below) else []


def _check(held_out: Scores, new: Scores) -> None:
    if not held_out or set(held_out) != set(new):
        got = f"scores {sorted(held_out)} and {sorted(new)}"
        raise Refusal(f"got {got}; expected the same names of both; compute them alike")
    for rows in (held_out, new):
        sizes = {tuple(values.shape) for values in rows.values()}
        if len(sizes) > 1 or min(sizes)[:1] in ((), (0,)) or len(min(sizes)) != 1:
            got = f"scores of shapes {sorted(sizes)}"
            raise Refusal(f"got {got}; expected (N,), as many of each; give rows to compare")
        if any(values.isnan().any() for values in rows.values()):
            raise Refusal("got scores with NaN; expected numbers that have an order; look at them")
