"""Which classes are taken for which: the confusion matrix."""

import torch
from torch import Tensor

from bayestune.errors import Refusal


def confusion(choices: Tensor, answers: Tensor, num_classes: int) -> Tensor:
    """The confusion matrix (C, C): entry (i, j) counts the rows of class i whose choice is j.

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


def precision_recall_f1(counts: Tensor) -> Tensor:
    """Precision, recall and F1 = 2 hits / (rows + chosen) of each class, (C, 3).

    NaN where they do not exist: precision of a class that is never chosen, recall of one without
    rows, F1 of one with neither.

    Args:
        counts: a confusion matrix (C, C), as `confusion` gives it.

    >>> precision_recall_f1(torch.tensor([[1, 1], [0, 1]]))[1].tolist()
    [0.5, 1.0, 0.666...]
    """
    hits = counts.diagonal().double()
    rows = counts.sum(1)
    chosen = counts.sum(0)
    return torch.stack([hits / chosen, hits / rows, 2 * hits / (rows + chosen)], dim=1)
