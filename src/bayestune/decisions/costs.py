"""What an error costs."""

import torch
from torch import Tensor

from bayestune.errors import Refusal


def check_costs(costs: Tensor, classes: int | None = None) -> None:
    """Refuses costs that are not square, finite, non-negative and somewhere positive.

    Args:
        costs: (C, C).
        classes: C; None where it is not known yet.
    """
    is_square = costs.ndim == 2 and costs.shape[0] == costs.shape[1]
    fits = is_square and (classes is None or len(costs) == classes)
    if fits and costs.isfinite().all() and (costs >= 0).all() and costs.max() > 0:
        return
    of = "" if classes is None else f" for {classes} classes"
    expected = "(C, C), finite, none below 0 and not all 0: rows are the right answers"
    raise Refusal(
        f"got costs of shape {tuple(costs.shape)}{of}, {costs.tolist()}; expected {expected}; give "
        "one cost for each choice under each right answer"
    )


def losses_of(choices: Tensor, labels: Tensor, costs: Tensor | None = None) -> Tensor:
    """The loss of each choice, (N,): 1 if wrong, or its cost as a share of the greatest.

    Args:
        choices: ĉ (N,).
        labels: y (N,).
        costs: (C, C), the cost of choosing the column where the row is right; not negative.

    Raises:
        Refusal: if costs are negative, infinite, not square, all 0, or too few for the classes.

    >>> costs = torch.tensor([[0.0, 1.0], [4.0, 0.0]])
    >>> losses_of(torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]), costs)
    tensor([0.0000, 0.2500, 1.0000], dtype=torch.float64)
    """
    if costs is None:
        return (choices != labels).double()
    check_costs(costs)
    most = int(torch.maximum(choices, labels).max()) + 1
    if len(costs) < most:
        check_costs(costs, most)
    return (costs.double() / costs.max())[labels, choices]
