"""A cascade: a cheap pass answers first, and the rows that it is in doubt about go on to draws."""

import torch
from torch import Tensor

from bayestune.errors import INNER_PART, Refusal


def doubtful_band(
    scores: Tensor, wrong: Tensor, risk: float, share: float = 0.3
) -> tuple[float, float]:
    """The scores between which rows go on: a share of the rows, around the cheap pass's threshold.

    The threshold is the largest at which the error rate of the rows acted on is at most the risk.
    It promises nothing, and need not: thresholds are set on the scores of the whole cascade. The
    band ends half-way between two scores, so that rounding moves no row across.

    Args:
        scores: of the cheap pass, (N,); larger means less sure.
        wrong: whether its choice is wrong, (N,).
        risk: largest error rate of the rows acted on.
        share: of the rows, that go on.

    Returns:
        The band's lower and upper end.

    Raises:
        Refusal: if the share is not between 0 and 1.

    >>> scores = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])
    >>> wrong = torch.tensor([False, False, False, True, True])
    >>> low, high = doubtful_band(scores, wrong, 0.1, 0.4)
    >>> round(low, 3), round(high, 3)
    (0.15, 0.35)
    """
    if share not in INNER_PART:
        raise Refusal(f"got cascade={share}; expected {INNER_PART.said}: the share of draws' rows")
    ordered, order = scores.double().sort(stable=True)
    count = torch.arange(1, len(ordered) + 1)
    holds = (wrong[order].cumsum(0) / count <= risk).nonzero()[:, 0]
    acted = int(holds[-1]) + 1 if len(holds) else 0  # rows below the threshold
    size = max(1, round(share * len(ordered)))  # rows in the band
    start = min(max(0, acted - (size + 1) // 2), len(ordered) - size)
    edges = torch.cat([ordered[:1] - 1, ordered, ordered[-1:] + 1])
    middles = (edges[1:] + edges[:-1]) / 2
    return middles[start].item(), middles[start + size].item()
