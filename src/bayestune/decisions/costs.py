"""What an error costs."""

import torch
from torch import Tensor

from bayestune.errors import Refusal


def losses_of(choices: Tensor, labels: Tensor, costs: Tensor | None = None) -> Tensor:
    """The loss of each choice, (N,): 1 if wrong, or its cost as a share of the greatest.

    Args:
        choices: ĉ (N,).
        labels: y (N,).
        costs: (C, C), the cost of choosing the column where the row is right; not negative.

    Raises:
        Refusal: if costs are negative, not square, all 0, or too few for the classes.

    >>> costs = torch.tensor([[0.0, 1.0], [4.0, 0.0]])
    >>> losses_of(torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]), costs)
    tensor([0.0000, 0.2500, 1.0000], dtype=torch.float64)
    """
    if costs is None:
        return (choices != labels).double()
    square = costs.ndim == 2 and costs.shape[0] == costs.shape[1]
    most = int(torch.maximum(choices, labels).max())
    if not square or len(costs) <= most or not (costs >= 0).all() or costs.max() <= 0:
        got = f"costs of shape {tuple(costs.shape)} for {most + 1} classes"
        expected = "(C, C), none below 0 and not all 0: rows are the right answers"
        raise Refusal(f"got {got}; expected {expected}; give one cost for each error")
    return (costs.double() / costs.max())[labels, choices]
