"""Which classes are taken for which: the confusion matrix."""

import torch
from torch import Tensor

from bayestune.errors import Refusal


def confusion(choices: Tensor, answers: Tensor, num_classes: int) -> Tensor:
    """How many rows of each class have which choice, (C, C): a line a right class.

    Args:
        choices: indices of the chosen classes, (N,).
        answers: indices of the right classes, (N,).
        num_classes: C.

    Raises:
        Refusal: if the shapes differ, or an index is not below C.

    >>> confusion(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    if choices.ndim != 1 or choices.shape != answers.shape:
        got = f"choices and answers of shapes {tuple(choices.shape)} and {tuple(answers.shape)}"
        raise Refusal(f"got {got}; expected (N,) of both; give one of each a row")
    both = torch.cat([choices, answers])
    if len(both) and not 0 <= int(both.min()) <= int(both.max()) < num_classes:
        got = f"class indices from {int(both.min())} to {int(both.max())}"
        raise Refusal(f"got {got}; expected 0 to {num_classes - 1}; give the number of classes")
    places = answers * num_classes + choices
    return torch.bincount(places, minlength=num_classes**2).reshape(num_classes, num_classes)
