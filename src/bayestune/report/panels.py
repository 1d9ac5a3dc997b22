"""The numbers behind the page's charts: of one run's rows, or of the runs of one fit."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bayestune.metrics import (
    SCORES,
    Bins,
    Row,
    accuracy,
    brier,
    confusion,
    error_auroc,
    is_right,
    nll,
    precision_recall_f1,
    reliability,
    risk_coverage,
    shift_auroc,
    uncertainty,
)
from bayestune.report.rows import tensors

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_REDRAWS = 1000
_POINTS = 120  # of a curve
_MOST_CLASSES = 30
_HISTOGRAMS = {  # a score, as a share of its most → bins and the right end
    "one_minus_confidence": (20, 1.0),
    "total_entropy": (20, 1.0),
    "mutual_information": (40, 0.5),
}
Numbers = dict[str, Any]


def short(number: float | None, digits: int = 4) -> float | None:
    """A number as the page has it: rounded, or None if it is not finite."""
    return None if number is None or not math.isfinite(number) else round(number, digits)


def shorts(numbers: Tensor, digits: int = 4) -> list[float | None]:
    """Numbers as the page has them."""
    return [short(number, digits) for number in numbers.tolist()]


def reliability_bins(rows: Sequence[Row], bins: int) -> list[Numbers]:
    """A reliability diagram: each bin's ends, rows, confidence and accuracy, and a range.

    The range holds nine in ten of the accuracies of a perfectly calibrated model with the same
    confidences: its answers are redrawn a thousand times.

    Reference: Bröcker, Smith (2007), https://doi.org/10.1175/WAF993.1
    """
    p, answers = tensors(rows)
    diagram = reliability(p, answers, bins)
    confidence = p.amax(1)
    bin_of_row = Bins(bins, "textbook").of(confidence)
    generator = torch.Generator().manual_seed(0)
    filled = []
    for index in diagram.counts.nonzero()[:, 0].tolist():
        own = confidence[bin_of_row == index].float()
        right = torch.rand(_REDRAWS, len(own), generator=generator) < own
        least, most = right.float().mean(1).quantile(torch.tensor([0.05, 0.95])).tolist()
        numbers = {
            "low": short(index / bins),
            "high": short((index + 1) / bins),
            "n": len(own),
            "confidence": short(diagram.confidence[index].item()),
            "accuracy": short(diagram.accuracy[index].item()),
            "least": short(least),
            "most": short(most),
        }
        filled.append(numbers)
    return filled


def coverage_curve(rows: Sequence[Row]) -> Numbers:
    """Risk by coverage in at most 120 points, and what the rows' decisions act on.

    Rows are in the order of the score that decides, where there is one, else of their confidence.
    """
    scores = [row["score"] for row in rows if row.get("score")]
    if len(scores) == len(rows):
        name = scores[0]["name"]
        unsureness = [math.inf if score["value"] is None else score["value"] for score in scores]
        values = -torch.tensor(unsureness, dtype=torch.float64)
    else:
        name = "confidence"
        values = torch.tensor([row["confidence"] for row in rows], dtype=torch.float64)
    risk = risk_coverage(values, is_right(rows))
    n = len(risk)
    shown = sorted({-(-n * k // _POINTS) for k in range(1, _POINTS + 1)})  # numbers of rows
    points = [[short(k / n), short(risk[k - 1].item())] for k in shown]
    return {"by": name, "points": points, "threshold": threshold_of(rows)}


def threshold_of(rows: Sequence[Row]) -> Numbers | None:
    """How many of these rows a calibration acts on, with how many errors; None without decisions.

    Beside them stand the threshold's value, where all rows have the same, and what is promised.
    """
    if not all("decision" in row for row in rows):
        return None
    calibration = rows[0].get("calibration")
    bands = calibration.get("bands") if isinstance(calibration, Mapping) else None
    acting = next(iter(bands or ()), "act")  # the decision that acts: of bands, the first
    acts = torch.tensor([row["decision"] == acting for row in rows])
    acted = int(acts.sum())
    wrong = int((acts & ~is_right(rows)).sum())
    thresholds = {(row.get("score") or {}).get("threshold") for row in rows}
    numbers: Numbers = {
        "coverage": short(acted / len(rows)),
        "acted": acted,
        "acting": acting,
        "wrong": wrong,
        "risk": short(wrong / acted) if acted else None,
        "value": thresholds.pop() if len(thresholds) == 1 else None,
    }
    if isinstance(calibration, Mapping):
        numbers["promised"] = calibration.get("risk")
        numbers["held_with"] = calibration.get("confidence")
    return numbers


def histograms(rows: Sequence[Row]) -> Numbers:
    """By score, how many right and how many wrong rows lie in each bin of the score.

    A score is taken as a share of the most that it can be.
    """
    right = is_right(rows)
    separable = 0 < int(right.sum()) < len(rows)
    by_score: Numbers = {}
    for score, (bins, end) in _HISTOGRAMS.items():
        values = uncertainty(rows, score, normalised=True).clamp(0, end)
        numbers: Numbers = {"width": end / bins}
        for name, flags in (("right", right), ("wrong", ~right)):
            counts = torch.histc(values[flags], bins, 0, end)
            numbers[name] = [int(count) for count in counts.tolist()]
        numbers["error_auroc"] = short(error_auroc(rows, score)) if separable else None
        by_score[score] = numbers
    return by_score


def shift_between(shifted: Sequence[Row], familiar: Sequence[Row]) -> Numbers:
    """The AUROC of each score for the rows of another task against familiar ones."""
    return {score: short(shift_auroc(shifted, familiar, score)) for score in SCORES}


def cloud(rows: Sequence[Row], most: int) -> list[list[Any]]:
    """Expected entropy, mutual information and 1 if right, else 0, of at most `most` rows."""
    right = is_right(rows).tolist()
    step = -(-len(rows) // max(1, most))
    dots = []
    for row, correct in list(zip(rows, right, strict=True))[::step]:
        aleatoric = short(row["expected_entropy"])
        epistemic = short(row["mutual_information"])
        dots.append([aleatoric, epistemic, int(correct)])
    return dots


def by_draws(rows: Sequence[Row]) -> list[Numbers]:
    """NLL, Brier score and accuracy of the average over the rows' first 1, 2, … draws.

    Nothing if rows have no draws, or not all the same number.
    """
    counts = {len(row.get("drawn") or ()) for row in rows}
    num_draws = counts.pop()
    if counts or not num_draws:
        return []
    answers = torch.tensor([row["answer"] for row in rows])
    widest = max(len(row["probabilities"]) for row in rows)
    drawn = torch.zeros(num_draws, len(rows), widest, dtype=torch.float64)
    for i, row in enumerate(rows):
        own = torch.tensor(row["drawn"], dtype=torch.float64)
        drawn[:, i, : own.shape[1]] = own / own.sum(1, keepdim=True)
    scores = []
    for count in range(1, num_draws + 1):
        mean = drawn[:count].mean(0).clamp(min=5e-5)  # four decimals are kept
        mean = torch.where(drawn[0].isnan(), mean, mean / mean.sum(1, keepdim=True))
        numbers = {
            "draws": count,
            "nll": short(nll(mean, answers)),
            "brier": short(brier(mean, answers)),
            "accuracy": short(accuracy(mean, answers)),
        }
        scores.append(numbers)
    return scores


def classes(rows: Sequence[Row]) -> Numbers | None:
    """The confusion matrix of rows that have equally many options, and each class's figures.

    Classes are the options where all rows have the same, else their places, A, B, …, or 1, 2, … if
    there are more than letters; None for rows of different numbers of options, or of more than 30.
    """
    widths = {len(row["probabilities"]) for row in rows}
    width = widths.pop()
    if widths or width > _MOST_CLASSES:
        return None
    options = {tuple(row.get("options") or ()) for row in rows}
    shared = len(options) == 1 and options != {()}
    if shared:
        names = list(options.pop())
    elif width <= len(LETTERS):
        names = list(LETTERS[:width])
    else:
        names = [str(i + 1) for i in range(width)]
    p, answers = tensors(rows)
    counts = confusion(p.argmax(1), answers, width)
    shares = precision_recall_f1(counts)
    figures = []
    for num_rows, line in zip(counts.sum(1).tolist(), shares, strict=True):
        figures.append([num_rows, *shorts(line)])
    return {"names": names, "shared": shared, "counts": counts.tolist(), "figures": figures}
