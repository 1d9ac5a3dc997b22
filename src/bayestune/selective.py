"""From uncertainties to rankings: who is wrong, what is out of distribution, and what is won by leaving rows out.

A *row* is what `bayestune.evaluation.prediction_rows` writes: answer, probabilities of its own options, confidence and
entropies in nats. Flags are bool or 0 and 1. All is computed in float64.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from bayestune.metrics import Interval

Row = Mapping[str, Any]

SCORES: Mapping[str, Callable[[Row], float]] = {
    "one_minus_confidence": lambda row: 1.0 - row["confidence"],
    "total_entropy": lambda row: row["total_entropy"],
    "expected_entropy": lambda row: row["expected_entropy"],
    "mutual_information": lambda row: row["mutual_information"],
}


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """A risk–coverage curve of N rows: share of rows answered, k/N for k = 1…N, and the error rate among them, (N,)."""

    coverage: Tensor
    risk: Tensor

    @property
    def aurc(self) -> float:
        """The mean risk: what `bayestune.metrics.aurc` gives."""
        return self.risk.mean().item()

    @property
    def excess_aurc(self) -> float:
        """E-AURC, the AURC less that of the same answers with all errors last: AURC − 1/N Σ_{j=1…e} j/(N − e + j).

        The sum is exact, not its limit r + (1 − r) log(1 − r).
        Reference: Geifman, Uziel, El-Yaniv (2019), https://arxiv.org/abs/1805.08206
        """
        n = len(self.risk)
        errors = round(self.risk[-1].item() * n)
        last = torch.arange(1, errors + 1, dtype=torch.float64)
        return self.aurc - (last / (n - errors + last)).sum().item() / n

    def accuracy_at(self, coverage: float) -> float:
        """Accuracy among the most confident rows, as few as make up the coverage: 1 − risk_k, k = ⌈coverage·N⌉.

        Args: coverage, a share of the rows in (0, 1]. Returns: a number in [0, 1]. Raises: ValueError.
        >>> curve = risk_coverage(torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([1, 1, 0, 1]))
        >>> [round(curve.accuracy_at(c), 4) for c in (0.5, 0.75, 1.0)]
        [1.0, 0.6667, 0.75]
        """
        if not 0 < coverage <= 1:
            raise ValueError(
                f"got coverage {coverage}; expected a share in (0, 1]; 0.8 leaves a fifth of the rows out"
            )
        kept = math.ceil(coverage * len(self.risk) - 1e-9)  # 0.07·100 is a little above 7
        return 1 - self.risk[max(kept, 1) - 1].item()


def _checked(values: Tensor, flags: Tensor, named: str) -> tuple[Tensor, Tensor]:
    if values.ndim != 1 or flags.shape != values.shape or values.numel() == 0:
        got = f"{named} of shapes {tuple(values.shape)} and {tuple(flags.shape)}"
        raise ValueError(
            f"got {got}; expected (N,) and (N,), not empty; give one of each for every row"
        )
    if values.isnan().any():
        raise ValueError(
            f"got {named} with NaN; expected numbers that have an order; look for NaN in the predictions"
        )
    if not ((flags == 0) | (flags == 1)).all():
        raise ValueError(
            f"got {named} from {flags.min()} to {flags.max()}; expected flags 0 or 1; compare first"
        )
    return values.detach().cpu().double(), flags.detach().cpu().bool()


def _wins(scores: Tensor, others: Tensor) -> Tensor:
    """Twice the number of `others` that each score exceeds, ties counted once: integers, so exact."""
    ordered = others.sort().values
    return torch.searchsorted(ordered, scores) + torch.searchsorted(ordered, scores, right=True)


def _classes(scores: Tensor, positive: Tensor, least: int) -> tuple[Tensor, Tensor]:
    values, flags = _checked(scores, positive, "scores and positives")
    above, below = values[flags], values[~flags]
    if min(len(above), len(below)) < least:
        got = f"{len(above)} positives and {len(below)} negatives"
        raise ValueError(
            f"got {got}; expected {least} or more of each; a ranking needs both classes, take more rows"
        )
    return above, below


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive's score exceeds a negative's: P(s⁺ > s⁻) + ½ P(s⁺ = s⁻), over all pairs.

    Args: scores (N,), of any unit, only their order counts; positive (N,), flags. Returns: a number in [0, 1], 0.5 for
    a coin flip or equal scores. Raises: ValueError, as where there is one class only.
    Reference: Mann, Whitney (1947), https://doi.org/10.1214/aoms/1177730491
    >>> auroc(torch.tensor([0.9, 0.5, 0.5, 0.1]), torch.tensor([1, 1, 0, 0]))
    0.875
    """
    above, below = _classes(scores, positive, 1)
    return _wins(above, below).sum().item() / (2 * len(above) * len(below))


def auroc_interval(scores: Tensor, positive: Tensor, level: float = 0.95) -> Interval:
    """AUROC with DeLong's interval on the logit scale: expit(logit a ± z·s/(a(1 − a))), s² = var(V⁺)/N⁺ + var(V⁻)/N⁻.

    V are the placements: for each row the share of the other class that it is ranked on the right side of.
    Args: as for `auroc`, with two rows or more of each class; level, the interval's mass. Returns: an Interval; a
    perfect ranking, and equal scores, have no variance and so no width, which is not certainty. Raises: ValueError.
    Reference: DeLong, DeLong, Clarke-Pearson (1988), https://doi.org/10.2307/2531595
    >>> interval = auroc_interval(torch.tensor([4.0, 3.0, 1.0, 2.0, 0.0]), torch.tensor([1, 1, 1, 0, 0]))
    >>> [round(x, 3) for x in (interval.value, interval.low, interval.high)]
    [0.833, 0.152, 0.993]
    """
    if not 0 < level < 1:
        raise ValueError(f"got level={level}; expected a number between 0 and 1; 0.95 is customary")
    above, below = _classes(scores, positive, 2)
    value, n = auroc(scores, positive), len(above) + len(below)
    if value in (0.0, 1.0):
        return Interval(value, value, value, n)
    placed = (
        _wins(above, below).double() / (2 * len(below)),
        _wins(below, above).double() / (2 * len(above)),
    )
    std = sum(v.var().item() / len(v) for v in placed) ** 0.5
    half = NormalDist().inv_cdf((1 + level) / 2) * std / (value * (1 - value))
    low, high = (
        (torch.tensor([-1.0, 1.0]).double() * half + math.log(value / (1 - value)))
        .sigmoid()
        .tolist()
    )
    return Interval(value, low, high, n)


def is_right(rows: Sequence[Row]) -> Tensor:
    """Whether the top option of each row (the first of equals) is the answer, (N,) bool.

    >>> is_right([{"probabilities": [0.5, 0.5], "answer": 0}, {"probabilities": [0.9, 0.1], "answer": 1}])
    tensor([ True, False])
    """
    return torch.tensor(
        [row["probabilities"].index(max(row["probabilities"])) == row["answer"] for row in rows]
    )


def uncertainty(rows: Sequence[Row], score: str, *, normalised: bool = False) -> Tensor:
    """A score of each row that is large where the model is unsure.

    With `normalised`, divided by the most it can be for the row's C options, so that rows of unlike C compare: log C
    for the entropies and the mutual information, 1 − 1/C for 1 − confidence. A uniform row is 1 then, whatever its C.

    Args: rows, N of them; score, a key of `SCORES`; normalised. Returns: (N,). Raises: ValueError.
    >>> two, four = ({"probabilities": [1 / c] * c, "total_entropy": math.log(c)} for c in (2, 4))
    >>> uncertainty([two, four], "total_entropy", normalised=True)
    tensor([1., 1.], dtype=torch.float64)
    """
    if score not in SCORES:
        raise ValueError(
            f"got score {score!r}; expected one of {tuple(SCORES)}; choose one of them"
        )
    try:
        values = torch.tensor([SCORES[score](row) for row in rows], dtype=torch.float64)
    except KeyError as missing:
        raise ValueError(
            f"got a row without {missing}; expected what `evaluate` writes; evaluate again"
        ) from missing
    if not normalised:
        return values
    options = torch.tensor([len(row["probabilities"]) for row in rows], dtype=torch.float64)
    if (options < 2).any():
        raise ValueError(
            "got a row of one option; expected two or more; there is no uncertainty in it, leave it out"
        )
    return values / (1 - 1 / options if score == "one_minus_confidence" else options.log())


def error_auroc(rows: Sequence[Row], score: str, *, normalised: bool = False) -> float:
    """Right or wrong: the probability that a wrong answer has more uncertainty than a right one.

    Args: rows, N of one data set; score and normalised as for `uncertainty`. Returns: a number in [0, 1]. Raises:
    ValueError, as where all are right.
    Reference: Hendrycks, Gimpel (2017), https://arxiv.org/abs/1610.02136
    """
    return auroc(uncertainty(rows, score, normalised=normalised), ~is_right(rows))


def shift_auroc(
    shifted: Sequence[Row], familiar: Sequence[Row], score: str, *, normalised: bool = True
) -> float:
    """In-domain or not: the probability that an out-of-distribution row has more uncertainty than an in-domain one.

    Normalised by default, as the two sets may ask questions with unlike numbers of options. It is below one half where
    the shifted questions are easier for the model, which is no fault of its uncertainty.

    Args: shifted and familiar, the rows of one and the same model; score and normalised as for `uncertainty`. Returns:
    a number in [0, 1]. Raises: ValueError, as where one set is empty.
    Reference: Hendrycks, Gimpel (2017), https://arxiv.org/abs/1610.02136
    """
    scores = [uncertainty(rows, score, normalised=normalised) for rows in (shifted, familiar)]
    return auroc(torch.cat(scores), torch.arange(len(shifted) + len(familiar)) < len(shifted))


def risk_coverage(confidence: Tensor, correct: Tensor) -> RiskCoverage:
    """The error rate among the k most confident rows for k = 1…N, ties in expectation over their order.

    Args: confidence (N,), correct (N,) flags. Returns: coverage and risk, (N,) each, whose mean risk is
    `metrics.aurc`. Raises: ValueError.
    Reference: El-Yaniv, Wiener (2010), https://jmlr.org/papers/v11/el-yaniv10a.html
    >>> risk_coverage(torch.tensor([0.9, 0.7, 0.7]), torch.tensor([1, 0, 1])).risk
    tensor([0.0000, 0.2500, 0.3333], dtype=torch.float64)
    """
    values, right = _checked(confidence, correct, "confidences and correctness")
    group, size = torch.unique(-values, return_inverse=True, return_counts=True)[1:]
    wrong = torch.zeros(len(size), dtype=torch.float64).index_add_(0, group, (~right).double())
    # All errors up to the end of a row's group of m tied rows, less e/m for each of them that comes after it.
    ends, total = size.cumsum(0), wrong.cumsum(0)
    place, of = (
        torch.arange(1, len(values) + 1),
        torch.repeat_interleave(torch.arange(len(size)), size),
    )
    errors = total[of] - (ends[of] - place) * wrong[of] / size[of]
    return RiskCoverage(place.double() / len(values), errors / place)
