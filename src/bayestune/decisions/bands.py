"""Several thresholds whose promises hold together: for each class, and for bands."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bayestune.decisions.bounds import Promise
from bayestune.decisions.thresholds import Threshold, check_enough, checked, last_kept, threshold
from bayestune.errors import INNER_PART, Refusal

NOT_BANDS = ("ask", "abstain")  # decisions on rows in no band


def check_bands(risks: Mapping[str, float]) -> None:
    """Refuses bands whose risks do not rise, or whose name is empty or means no band.

    Args:
        risks: by the bands' names, in order.
    """
    in_order = list(risks.values())
    if any(risk not in INNER_PART for risk in in_order):
        got = f"got bands {dict(risks)}; expected each risk {INNER_PART.said}"
        raise Refusal(f"{got}; 0.05 is one error in 20")
    if not in_order or sorted(set(in_order)) != in_order:
        raise Refusal(f"got bands {dict(risks)}; expected rising risks; put the strictest first")
    reserved = [name for name in risks if name.strip() in ("", *NOT_BANDS)]
    if reserved:
        got = f"a band named {reserved[0]!r}"
        expected = "another name: rows beyond the last band are told to ask"
        raise Refusal(f"got {got}; expected {expected}; such as {{act: 0.05, flag: 0.2}}")


def class_thresholds(
    scores: Tensor,
    losses: Tensor,
    choices: Tensor,
    promise: Promise,
    starts: Sequence[int | None],
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
        starts: C of them, for each class `start` as in `threshold`.
        bounded: as in `threshold`.

    Raises:
        Refusal: if no class has enough rows.
    """
    scores, losses = checked(scores, losses, bounded=bounded)
    of_class = promise.shared_by(len(starts))
    most = int(torch.bincount(choices, minlength=len(starts)).max())
    check_enough(most, of_class, most / len(scores))
    thresholds = {}
    for index, start in enumerate(starts):
        chosen = choices == index
        thresholds[index] = last_kept(
            scores[chosen], losses[chosen], of_class, start, bounded=bounded
        )
    return thresholds


def band_thresholds(
    scores: Tensor,
    losses: Tensor,
    risks: Mapping[str, float],
    confidence: float,
    starts: Mapping[str, int] | None = None,
    *,
    bounded: bool = False,
) -> dict[str, Threshold]:
    """Thresholds of several bands, strictest first: {"act": 0.05, "flag": 0.2}.

    Among the rows in a band or a stricter one the mean loss is at most the band's risk; δ is
    divided by the number of bands, so all hold at once. Rows beyond the last band are in none.

    Args:
        scores: (N,).
        losses: (N,), in [0, 1].
        risks: by the bands' names, strictest first.
        confidence: that all hold at once.
        starts: as `start` in `threshold`, by name.
        bounded: as in `threshold`.

    Returns:
        The bands' thresholds by name, in the order of `risks`.

    Raises:
        Refusal: if the risks do not rise, a band is named "ask" or "abstain", or there are too few
            rows for the first.
    """
    check_bands(risks)
    thresholds = {}
    for name, promise in band_promises(risks, confidence).items():
        start = (starts or {}).get(name)
        thresholds[name] = threshold(scores, losses, promise, start, bounded=bounded)
    return thresholds


def band_promises(risks: Mapping[str, float], confidence: float) -> dict[str, Promise]:
    """What each band must keep so that all hold at once."""
    delta = (1 - confidence) / len(risks)
    return {name: Promise(risk, 1 - delta) for name, risk in risks.items()}
