"""Several thresholds whose promises hold together: for each class, and for bands."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bayestune.decisions.bounds import Promise
from bayestune.decisions.thresholds import Threshold, check_enough, checked, last_kept, threshold
from bayestune.errors import Refusal


def class_thresholds(
    scores: Tensor,
    losses: Tensor,
    choices: Tensor,
    promise: Promise,
    num_classes: int,
    *,
    bounded: bool = False,
) -> dict[int, Threshold]:
    """A threshold for the rows of each choice, so that the risk holds for each answer by itself.

    δ is divided by the number of classes, so all hold at once. A class with too few rows has no
    threshold and is never acted on.

    Args:
        scores: (N,).
        losses: (N,), in [0, 1].
        choices: ĉ (N,); classes must mean the same in every row.
        promise: for each class.
        num_classes: C.
        bounded: as in `threshold`.

    Raises:
        Refusal: if no class has enough rows.
    """
    values, sums = checked(scores, losses, bounded=bounded)
    each = promise.shared_by(num_classes)
    most = int(torch.bincount(choices, minlength=num_classes).max())
    check_enough(most, each, most / len(values))
    found = {}
    for index in range(num_classes):
        own = choices == index
        if own.any():
            found[index] = last_kept(values[own], sums[own], each, None, whole=not bounded)
        else:
            found[index] = Threshold(None, each.risk, each.confidence, 0, 0, 0.0, 1.0)
    return found


def band_thresholds(
    scores: Tensor,
    losses: Tensor,
    risks: Mapping[str, float],
    confidence: float,
    *,
    bounded: bool = False,
) -> dict[str, Threshold]:
    """Thresholds of several bands, strictest first: {"act": 0.05, "flag": 0.2}.

    Among the rows in a band or a stricter one the mean loss is at most the band's risk; δ is
    divided by the number of bands, so all hold at once. Rows beyond the last are asked about.

    Raises:
        Refusal: if the risks do not rise, or there are too few rows for the first.
    """
    asked = list(risks.values())
    if not asked or sorted(set(asked)) != asked:
        raise Refusal(f"got bands {dict(risks)}; expected rising risks; put the strictest first")
    delta = (1 - confidence) / len(asked)
    found = {}
    for name, risk in risks.items():
        found[name] = threshold(scores, losses, Promise(risk, 1 - delta), bounded=bounded)
    return found
