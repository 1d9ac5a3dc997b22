"""Exact intervals of a share of rows, such as accuracy, also where all rows are right."""

import math

import torch
from torch import Tensor

_HALVINGS = 60  # of an interval of width 1: to the last bit


def _log_choose(num_rows: int) -> Tensor:
    """log of N over j for j = 0…N, (N + 1,)."""
    j = torch.arange(num_rows + 1, dtype=torch.float64)
    return math.lgamma(num_rows + 1) - torch.lgamma(j + 1) - torch.lgamma(num_rows - j + 1)


def share_interval(right: int, num_rows: int, level: float) -> tuple[float, float]:
    """The mid-p Clopper–Pearson interval of the share θ of right rows, when k of N were right.

    It holds all θ for which P(K > k) + ½ P(K = k) and P(K < k) + ½ P(K = k) are both at least
    (1 − level)/2, K ~ Binomial(N, θ).

    Args:
        right: k.
        num_rows: N.
        level: such as 0.95.

    Returns:
        Low and high; of 50 right out of 50 the low end is 0.94 and not 1.

    >>> [round(end, 4) for end in share_interval(50, 50, 0.95)]
    [0.9418, 1.0]

    Reference: Berry, Armitage (1995), https://doi.org/10.2307/2348891
    """
    log_choose = _log_choose(num_rows)
    counts = torch.arange(num_rows + 1, dtype=torch.float64)

    def at_least(share: float) -> float:
        """P(K > k) + ½ P(K = k), which rises with the share."""
        logs = log_choose + counts * math.log(share) + (num_rows - counts) * math.log1p(-share)
        chances = logs.exp()
        return (chances[right + 1 :].sum() + chances[right] / 2).item()

    def share_at(chance: float) -> float:
        """The share at which `at_least` is `chance`, by bisection."""
        low = 0.0
        high = 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if middle in (low, high):
                break
            if at_least(middle) < chance:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    tail = (1 - level) / 2
    low = share_at(tail) if right else 0.0
    high = share_at(1 - tail) if right < num_rows else 1.0
    return low, high
