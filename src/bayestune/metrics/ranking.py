"""Rankings by uncertainty: who is wrong, what is out of distribution, what abstaining gains.

A row is what `bayestune.evaluation.prediction_rows` writes: answer, probabilities of its own
options, confidence, and entropies in nats; a score is one of `SCORES`. Tensors of scores,
confidences and flags (bool, or 0 and 1) are (N,). Everything is computed in float64, and Refusal
is raised on what cannot be ranked: no rows, other shapes, NaN, or flags that are all the same where
both are needed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from bayestune.errors import Refusal

Row = Mapping[str, Any]
SCORES = ("one_minus_confidence", "total_entropy", "expected_entropy", "mutual_information")


def _checked(values: Tensor, flags: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Values in float64 and flags as bool, (N,) each; `what` names both in an error."""
    if values.ndim != 1 or flags.shape != values.shape or values.numel() == 0:
        got = f"{what} of shapes {tuple(values.shape)} and {tuple(flags.shape)}"
        raise Refusal(f"got {got}; expected (N,) and (N,), not empty; give one of each a row")
    if values.isnan().any():
        expected = "numbers that have an order"
        raise Refusal(f"got {what} with NaN; expected {expected}; look at the predictions")
    if not ((flags == 0) | (flags == 1)).all():
        got = f"{what} from {flags.min()} to {flags.max()}"
        raise Refusal(f"got {got}; expected flags 0 or 1; compare with the answers first")
    return values.detach().cpu().double(), flags.detach().cpu().bool()


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive scores higher than a negative: P(s⁺ > s⁻) + ½ P(s⁺ = s⁻).

    Only the order of the scores counts; equal scores give 0.5, as a coin flip does.

    >>> auroc(torch.tensor([0.9, 0.5, 0.5, 0.1]), torch.tensor([1, 1, 0, 0]))
    0.875

    Reference: Mann, Whitney (1947), https://doi.org/10.1214/aoms/1177730491
    """
    values, flags = _checked(scores, positive, "scores and positives")
    above = values[flags]
    below = values[~flags].sort().values
    pairs = len(above) * len(below)
    if pairs == 0:
        got = f"{len(above)} positives and {len(below)} negatives"
        raise Refusal(f"got {got}; expected some of each, to rank them; take more rows")
    less = torch.searchsorted(below, above)
    less_or_equal = torch.searchsorted(below, above, right=True)
    return (less + less_or_equal).sum().item() / (2 * pairs)


def is_right(rows: Sequence[Row]) -> Tensor:
    """Whether the top option of each row (the first of equals) is the answer, (N,) bool.

    >>> is_right([{"probabilities": [0.5, 0.5], "answer": i} for i in (0, 1)])
    tensor([ True, False])
    """
    tops = [row["probabilities"].index(max(row["probabilities"])) for row in rows]
    return torch.tensor([top == row["answer"] for top, row in zip(tops, rows, strict=True)])


def uncertainty(rows: Sequence[Row], score: str, *, normalised: bool = False) -> Tensor:
    """A score of each row that is large where the model is unsure, (N,), in nats if an entropy.

    If `normalised`, it is divided by the most that it can be for the row's C options, log C or
    1 − 1/C, so that rows of different C compare; a uniform row then has 1, except for the mutual
    information.

    Raises:
        Refusal: if the score is unknown, or a row lacks it or has no second option.

    >>> rows = [{"probabilities": [1 / c] * c, "confidence": 1 / c} for c in (2, 4)]
    >>> uncertainty(rows, "one_minus_confidence", normalised=True)
    tensor([1., 1.], dtype=torch.float64)
    """
    if score not in SCORES:
        raise Refusal(f"got score {score!r}; expected one of {SCORES}; choose one")
    of_confidence = score == "one_minus_confidence"
    try:
        written = [row["confidence" if of_confidence else score] for row in rows]
    except KeyError as missing:
        got = f"a row without {missing}"
        raise Refusal(f"got {got}; expected what `evaluate` writes; evaluate again") from missing
    scores = torch.tensor(written, dtype=torch.float64)
    scores = 1 - scores if of_confidence else scores
    if not normalised:
        return scores
    options = torch.tensor([len(row["probabilities"]) for row in rows], dtype=torch.float64)
    if (options < 2).any():
        raise Refusal("got a row of one option; expected two or more; leave it out")
    return scores / (1 - 1 / options if of_confidence else options.log())


def error_auroc(rows: Sequence[Row], score: str) -> float:
    """AUROC of a score for errors: how often a wrong answer is more uncertain than a right one.

    Reference: Hendrycks, Gimpel (2017), https://arxiv.org/abs/1610.02136
    """
    return auroc(uncertainty(rows, score), ~is_right(rows))


def shift_auroc(shifted: Sequence[Row], familiar: Sequence[Row], score: str) -> float:
    """AUROC of a score for shifted rows: how often one is more uncertain than a familiar row.

    Scores are normalised, because the two sets may differ in their numbers of options. Where the
    shifted questions are easier for the model than the familiar ones, the result is below one half,
    which does not mean that its uncertainty is wrong.

    Reference: Hendrycks, Gimpel (2017), https://arxiv.org/abs/1610.02136
    """
    scores = uncertainty([*shifted, *familiar], score, normalised=True)
    return auroc(scores, torch.arange(len(scores)) < len(shifted))


def risk_coverage(confidence: Tensor, correct: Tensor) -> Tensor:
    """Error rate among the k most confident of N rows, k = 1…N; their mean is the AURC.

    Ties count in expectation over their order.

    >>> risk_coverage(torch.tensor([0.9, 0.7, 0.7]), torch.tensor([1, 0, 1]))
    tensor([0.0000, 0.2500, 0.3333], dtype=torch.float64)

    Reference: El-Yaniv, Wiener (2010), https://jmlr.org/papers/v11/el-yaniv10a.html
    """
    values, right = _checked(confidence, correct, "confidences and correctness")
    _, group, size = torch.unique(-values, return_inverse=True, return_counts=True)
    wrong = torch.zeros(len(size), dtype=torch.float64).index_add_(0, group, (~right).double())
    ends = pad(size.cumsum(0), (1, 0))
    place = torch.arange(1, len(values) + 1)
    # Expected errors rise evenly within a tied group.
    errors = np.interp(place, ends, pad(wrong.cumsum(0), (1, 0)))
    return torch.from_numpy(errors) / place
