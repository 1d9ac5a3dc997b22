"""Which unlabelled rows to label next."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.special import entr

from bayestune.decisions.row_scores import Spread
from bayestune.errors import Refusal

Acquisition = Literal["bald", "batch_bald", "entropy", "margin", "random"]
_MOST_OUTCOMES = 2**10  # joint answers of a batch
_DRAWS = 32  # whose deviations from the mean are a row's features, where it has no others
_POOL = 5  # candidates for each row that is chosen


def rank_rows(
    logits: Tensor,
    number: int,
    acquisition: Acquisition = "bald",
    features: Tensor | None = None,
    seed: int = 0,
    same: Sequence[str] | None = None,
) -> Tensor:
    """Indices of the rows to label, the first one first, (b,).

    "bald": of the 5b rows of largest mutual information the greedy k-centre of size b, beginning
    with the largest, so that chosen rows differ. "batch_bald": greedily the largest joint mutual
    information I(y_1…y_b; A), exact, for a handful of rows. "entropy" and "margin": the largest of
    the score. "random": a permutation.

    Args:
        logits: (S, N, C) of unlabelled rows, -inf where a row has fewer options.
        number: b, at most N.
        acquisition: the rule.
        features: (N, k), where rows are near that are alike, such as `spread_out` activations of
            the adapter; the draws' probabilities about their average unless given.
        seed: of "random".
        same: a key for each row. Rows with equal keys are one question, whose label is wanted once:
            all but the first of them come last.

    Raises:
        Refusal: if b is not in 1…N, a rule over draws has one draw, or too many joint answers.

    >>> sure, torn = [[9.0, 0.0], [9.0, 0.0]], [[9.0, 0.0], [0.0, 9.0]]
    >>> rank_rows(torch.tensor([sure, torn, torn]).transpose(0, 1), 2, "batch_bald").tolist()[0]
    1

    References:
        BALD: Houlsby et al. (2011), https://arxiv.org/abs/1112.5745; BatchBALD: Kirsch, van
        Amersfoort, Gal (2019), https://arxiv.org/abs/1906.08158; k-centre: Sener, Savarese (2018),
        https://arxiv.org/abs/1708.00489.
    """
    spread = Spread.of(logits)
    draws, num_rows, num_classes = logits.shape
    check_ranking(number, acquisition, draws, num_rows, num_classes)
    if same is not None and len(set(same)) < num_rows:
        first, repeated = _parted(same)
        of_first = None if features is None else features[first]
        count = min(number, len(first))
        order = rank_rows(logits[:, first], count, acquisition, of_first, seed)
        return torch.cat([first[order], repeated])[:number]
    if acquisition == "random":
        return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))[:number]
    if acquisition == "batch_bald":
        return _batch_bald(spread, number)
    if acquisition == "bald":
        return _diverse(spread, number, features)
    score = spread.total_entropy() if acquisition == "entropy" else spread.negative_margin()
    return score.argsort(descending=True, stable=True)[:number]


def _parted(same: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Indices of the first row of each key, and of the other rows."""
    first: dict[str, int] = {}
    for index, key in enumerate(same):
        first.setdefault(key, index)
    is_first = set(first.values())
    repeated = [index for index in range(len(same)) if index not in is_first]
    return torch.tensor(list(first.values())), torch.tensor(repeated, dtype=torch.long)


def check_ranking(
    number: int, acquisition: Acquisition, draws: int, num_rows: int, num_classes: int
) -> None:
    """Refuses what `rank_rows` cannot do with logits (S, N, C), before these are computed.

    Args:
        number: b, how many rows to rank.
        acquisition: the rule.
        draws: S.
        num_rows: N.
        num_classes: C.
    """
    if acquisition not in get_args(Acquisition):
        expected = f"one of {get_args(Acquisition)}"
        raise Refusal(f"got {acquisition!r}; expected {expected}; choose one")
    if not 1 <= number <= num_rows:
        raise Refusal(f"got number={number}; expected 1 to {num_rows}; there are so many rows")
    if acquisition in ("bald", "batch_bald") and draws < 2:
        raise Refusal(f"got one draw for {acquisition!r}; expected two or more; set --draws 10")
    most = int(math.log(_MOST_OUTCOMES) / math.log(max(2, num_classes)))
    if acquisition == "batch_bald" and number > most:
        raise Refusal(
            f"got number={number} for 'batch_bald'; expected {most} or fewer with {num_classes} "
            "options: joint answers are counted exactly; take 'bald'"
        )


def usual_acquisition(draws: int) -> Acquisition:
    """The rule where none is asked for: "bald" over several draws, "entropy" of a single one."""
    return "bald" if draws > 1 else "entropy"


def ranked_lines(
    order: Tensor, rows: Sequence[Mapping[str, Any]], by: Acquisition, scores: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """A JSON line for each ranked row, the first one first: rank, fields, rule and every score.

    Args:
        order: the indices that `rank_rows` gave.
        rows: the fields that stand in each row's line, for all N rows.
        by: the rule.
        scores: by name, (N,) each.
    """
    lines = []
    for rank, index in enumerate(order.tolist(), 1):
        of_row = {name: values[index].item() for name, values in scores.items()}
        lines.append({"rank": rank, **rows[index], "by": by, **of_row})
    return lines


def _diverse(spread: Spread, number: int, features: Tensor | None) -> Tensor:
    """The k-centre of size b among the 5b rows of largest mutual information."""
    order = spread.mutual_information().argsort(descending=True, stable=True)
    candidates = order[: _POOL * number]
    if features is None:
        # (N, S·C); the first draws stand for a thousand
        points = (spread.draws[:_DRAWS] - spread.mean).transpose(0, 1).flatten(1)
    else:
        points = features.detach().cpu().double()
    if points.ndim != 2 or len(points) != len(order):
        got = f"features of shape {tuple(points.shape)}"
        raise Refusal(f"got {got}; expected ({len(order)}, k); give one vector for each row")
    return candidates[_centres(points[candidates], number)]


def _centres(points: Tensor, number: int) -> Tensor:
    """Greedily the point farthest from those chosen, from the first on; the first of equals.

    Args:
        points: (n, k).
        number: b ≤ n.

    Returns:
        Indices of the points, (b,).
    """
    chosen = [0]
    nearest = (points - points[0]).square().sum(-1)  # squared distance to the nearest chosen point
    for _ in range(number - 1):
        nearest[chosen] = -1  # a point is never chosen twice, even if all points are alike
        farthest = int(nearest.argmax())
        chosen.append(farthest)
        nearest = torch.minimum(nearest, (points - points[farthest]).square().sum(-1))
    return torch.tensor(chosen)


def _batch_bald(spread: Spread, number: int) -> Tensor:
    """Greedily the row that adds most to H[y_1…y_b] − Σ E_s H[p_s], (b,)."""
    num_draws = len(spread.draws)
    conditional = entr(spread.draws).sum(-1).mean(0)  # E_s H[p_s] of each row, (N,)
    joint = torch.ones(num_draws, 1, dtype=torch.float64)  # P(answers of the batch | draw), (S, J)
    chosen: list[int] = []
    for _ in range(number):
        outcomes = torch.einsum("sj,snc->njc", joint, spread.draws) / num_draws
        gains = entr(outcomes).sum((1, 2)) - conditional
        gains[chosen] = -torch.inf
        best = int(gains.argmax())
        chosen.append(best)
        joint = (joint[:, :, None] * spread.draws[:, best, None, :]).flatten(1)
    return torch.tensor(chosen)
