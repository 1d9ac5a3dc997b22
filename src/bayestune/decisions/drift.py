"""Are new rows like the held-out ones? A two-sample test on scores, and the rows that stick out.

Compare with held-out rows and never with training rows: a model is surer of what it was fitted on,
so training rows always differ.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bayestune.errors import Refusal
from bayestune.metrics import holm

Scores = Mapping[str, Tensor]
_BLOCK = 2**21  # numbers in one block of permutations
_USUAL = 999  # permutations
_MOST = 99_999  # permutations, which take minutes


@dataclass(frozen=True)
class Drift:
    """Whether new rows differ from the held-out ones.

    Args:
        p_value: of no difference in any score: the smallest of `p_values`.
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
    held_out: Scores, new: Scores, permutations: int = _USUAL, seed: int = 0, odd_share: float = 0.1
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


def permutations_for(level: float, num_scores: int) -> int:
    """How many permutations a test takes: 999, or more where p could not fall below the level.

    Holm's smallest p-value is m/(1 + R) for m scores; R is twice as large as that needs.

    Args:
        level: of the test, in (0, 1).
        num_scores: m.

    >>> [permutations_for(level, 5) for level in (0.05, 0.001)]
    [999, 9999]

    Raises:
        Refusal: if the test would take too many.
    """
    needed = max(_USUAL, math.ceil(2 * num_scores / level) - 1)
    if needed > _MOST:
        least = math.ceil(1e5 * 2 * num_scores / (1 + _MOST)) / 1e5
        raise Refusal(
            f"got level={level:g}; expected {least:g} or more for {num_scores} scores: {needed} "
            "permutations could tell less, and take too long; raise it, or name fewer scores"
        )
    return needed


def false_alarm_rate(
    held_out: Scores, num_new: int, level: float = 0.05, repetitions: int = 200, seed: int = 0
) -> float:
    """How often the test calls some held-out rows different from the others: a share.

    In each repetition `num_new` of the rows, drawn without replacement, play the new ones. All
    repetitions use the same permutations, because they pool the same rows.

    Args:
        held_out: scores of held-out rows by name, (N,) each.
        num_new: how many of them play the new rows.
        level: of the test.
        repetitions: how often it is tried.
        seed: of repetitions and permutations.

    Raises:
        Refusal: if there are not more rows than `num_new`.
    """
    count = len(next(iter(held_out.values())))
    if not 0 < num_new < count:
        got = f"num_new={num_new} of {count} rows"
        raise Refusal(f"got {got}; expected 1 to {count - 1}; take fewer")
    permutations = permutations_for(level, len(held_out))
    num_held = count - num_new
    blocks: dict[str, list[Tensor]] = {name: [] for name in held_out}
    for held in _random_parts(count, num_held, repetitions + permutations, seed):
        for name, values in held_out.items():
            ordered, order = values.sort()
            blocks[name].append(_largest_gaps(held[:, order], num_held, _ends(ordered)))
    smallest = torch.ones(repetitions, dtype=torch.float64)
    for distances in blocks.values():
        tried, permuted = torch.cat(distances).split([repetitions, permutations])
        below = torch.searchsorted(permuted.sort().values, tried - 1e-12)
        smallest = smallest.minimum((1 + permutations - below) / (1 + permutations))
    return (smallest * len(held_out) <= level).double().mean().item()


def _distances(pooled: Tensor, num_held: int, permutations: int, seed: int) -> Tensor:
    """The distance between held-out and new rows, then those of R random partitions, (1 + R,).

    Args:
        pooled: a score of the held-out rows, then of the new ones.
        num_held: how many are held-out rows.
        permutations: R.
        seed: of the partitions.
    """
    values, order = pooled.sort()
    ends = _ends(values)
    distances = [_largest_gaps((order < num_held)[None], num_held, ends)]
    for held in _random_parts(len(pooled), num_held, permutations, seed):
        distances.append(_largest_gaps(held, num_held, ends))
    return torch.cat(distances)


def _random_parts(count: int, num_held: int, number: int, seed: int) -> Iterator[Tensor]:
    """Random choices of `num_held` of `count` rows, `number` of them, as flags in blocks (R, N)."""
    generator = torch.Generator().manual_seed(seed)
    block = max(1, _BLOCK // count)
    for start in range(0, number, block):
        size = min(block, number - start)
        keys = torch.rand(size, count, generator=generator)
        held = torch.zeros(size, count, dtype=torch.bool)
        yield held.scatter_(1, keys.topk(num_held, 1, sorted=False).indices, True)


def _ends(ordered: Tensor) -> Tensor:
    """Which of the ordered values is the last of its equals, (N,)."""
    return torch.cat([ordered[1:] > ordered[:-1], torch.ones(1, dtype=torch.bool)])


def _largest_gaps(held: Tensor, num_held: int, ends: Tensor) -> Tensor:
    """max |F_held − F_new| over values, (R,).

    Args:
        held: (R, N) bool, which rows count as held-out, in the order of their values.
        num_held: how many do in each of the R.
        ends: as `_ends` gives them, (N,).
    """
    num_new = held.shape[1] - num_held
    below = held.double().cumsum(1)
    total = torch.arange(1, held.shape[1] + 1, dtype=torch.float64)
    gaps = (below / num_held - (total - below) / num_new).abs()
    return gaps[:, ends].amax(1)


def _row_p_values(held_out: Scores, new: Scores) -> Tensor:
    """Each new row's p-value, (M,): the least over scores times their number (Bonferroni).

    Of one score it is (1 + #{held-out rows with as large a score})/(1 + N).
    """
    by_score = []
    for name, values in held_out.items():
        ordered = values.double().sort().values
        below = torch.searchsorted(ordered, new[name].double())
        by_score.append((1 + len(ordered) - below) / (1 + len(ordered)))
    return (torch.stack(by_score).amin(0) * len(by_score)).clamp_max(1)


def _odd(p_values: Tensor, share: float) -> list[int]:
    """The k smallest, k the last with p_(k) ≤ share · k/M (Benjamini and Hochberg)."""
    values, order = p_values.sort(stable=True)
    rank = torch.arange(1, len(values) + 1)
    below = (values <= share * rank / len(values)).nonzero()
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
