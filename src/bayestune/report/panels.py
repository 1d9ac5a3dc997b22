"""The numbers behind the page's charts: of one run's rows, or of the runs of one fit."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bayestune.metrics import (
    SCORES,
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
    """Of each bin with rows: its ends, rows, confidence, accuracy, and a calibrated model's range.

    The range holds nine in ten of the accuracies of a perfectly calibrated model with the same
    confidences: its answers are redrawn a thousand times.

    Reference: Bröcker, Smith (2007), https://doi.org/10.1175/WAF993.1
    """
    p, answers = tensors(rows)
    diagram = reliability(p, answers, bins)
    confidence = p.amax(1)
    edges = (torch.arange(bins + 1, dtype=torch.float64) / bins).float()
    place = (torch.bucketize(confidence.float(), edges) - 1).clamp(0, bins - 1)
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in diagram.counts.nonzero()[:, 0].tolist():
        own = confidence[place == index].float()
        right = torch.rand(_REDRAWS, len(own), generator=generator) < own
        least, most = right.float().mean(1).quantile(torch.tensor([0.05, 0.95])).tolist()
        one = {"low": short(index / bins), "high": short((index + 1) / bins), "n": len(own)}
        one["confidence"] = short(diagram.confidence[index].item())
        one["accuracy"] = short(diagram.accuracy[index].item())
        found.append(one | {"least": short(least), "most": short(most)})
    return found


def coverage_curve(rows: Sequence[Row]) -> Numbers:
    """Risk by coverage in at most 120 points, and the threshold that the rows' decisions keep.

    Rows are in the order of the score that decides, where there is one, else of their confidence.
    """
    scores = [row["score"] for row in rows if row.get("score")]
    name = "confidence"
    values = torch.tensor([row["confidence"] for row in rows], dtype=torch.float64)
    if len(scores) == len(rows):
        name = scores[0]["name"]
        known = [score["value"] for score in scores]
        numbers = [math.inf if value is None else value for value in known]
        values = -torch.tensor(numbers, dtype=torch.float64)
    risk = risk_coverage(values, is_right(rows))
    n = len(risk)
    ends = sorted({-(-n * k // _POINTS) for k in range(1, _POINTS + 1)})
    points = [[short(k / n), short(risk[k - 1].item())] for k in ends]
    return {"by": name, "points": points, "threshold": threshold_of(rows)}


def threshold_of(rows: Sequence[Row]) -> Numbers | None:
    """What a calibration acts on of these rows, with how many errors; None without decisions."""
    if not all("decision" in row for row in rows):
        return None
    promised = rows[0].get("calibration")
    bands = promised.get("bands") if isinstance(promised, Mapping) else None
    acting = next(iter(bands or ()), "act")
    acts = torch.tensor([row["decision"] == acting for row in rows])
    wrong = acts & ~is_right(rows)
    acted = int(acts.sum())
    thresholds = {(row.get("score") or {}).get("threshold") for row in rows}
    found: Numbers = {"coverage": short(acted / len(rows)), "acted": acted, "acting": acting}
    found["wrong"] = int(wrong.sum())
    found["risk"] = short(int(wrong.sum()) / acted) if acted else None
    found["value"] = thresholds.pop() if len(thresholds) == 1 else None
    if isinstance(promised, Mapping):
        found |= {"promised": promised.get("risk"), "held_with": promised.get("confidence")}
    return found


def histograms(rows: Sequence[Row]) -> Numbers:
    """Of each score, as a share of the most it can be: rows right and wrong in each bin."""
    right = is_right(rows)
    found: Numbers = {}
    for score, (bins, end) in _HISTOGRAMS.items():
        values = uncertainty(rows, score, normalised=True).clamp(0, end)
        one: Numbers = {"width": end / bins}
        for name, flags in (("right", right), ("wrong", ~right)):
            counts = torch.histc(values[flags], bins, 0, end)
            one[name] = [int(count) for count in counts.tolist()]
        separable = 0 < int(right.sum()) < len(rows)
        one["error_auroc"] = short(error_auroc(rows, score)) if separable else None
        found[score] = one
    return found


def shift_between(shifted: Sequence[Row], familiar: Sequence[Row]) -> Numbers:
    """The AUROC of each score for the rows of another task against familiar ones."""
    return {score: short(shift_auroc(shifted, familiar, score)) for score in SCORES}


def cloud(rows: Sequence[Row], most: int) -> list[list[Any]]:
    """Expected entropy, mutual information and right or wrong of rows, at most so many."""
    right = is_right(rows).tolist()
    every = -(-len(rows) // max(1, most))
    dots = []
    for row, correct in list(zip(rows, right, strict=True))[::every]:
        parts = (row["expected_entropy"], row["mutual_information"])
        dots.append([*(short(part) for part in parts), int(correct)])
    return dots


def by_draws(rows: Sequence[Row]) -> list[Numbers]:
    """NLL, Brier score and accuracy of the average over the first 1, 2, … draws of the rows."""
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
    found = []
    for count in range(1, num_draws + 1):
        mean = drawn[:count].mean(0).clamp(min=5e-5)  # four decimals are kept
        mean = torch.where(drawn[0].isnan(), mean, mean / mean.sum(1, keepdim=True))
        one: Numbers = {"draws": count, "nll": short(nll(mean, answers))}
        one["brier"] = short(brier(mean, answers))
        found.append(one | {"accuracy": short(accuracy(mean, answers))})
    return found


def classes(rows: Sequence[Row]) -> Numbers | None:
    """The confusion matrix of rows that have equally many options, and each class's figures.

    Classes are the options where all rows have the same, else their places, A, B, …; None for rows
    of different numbers of options, or of more than 30.
    """
    widths = {len(row["probabilities"]) for row in rows}
    width = widths.pop()
    if widths or width > _MOST_CLASSES:
        return None
    options = {tuple(row.get("options") or ()) for row in rows}
    shared = len(options) == 1 and options != {()}
    lettered = list(LETTERS[:width]) if width <= len(LETTERS) else None
    names = list(options.pop()) if shared else lettered or [str(i + 1) for i in range(width)]
    p, answers = tensors(rows)
    counts = confusion(p.argmax(1), answers, width)
    shares = precision_recall_f1(counts)
    figures = []
    for num_rows, line in zip(counts.sum(1).tolist(), shares, strict=True):
        figures.append([num_rows, *shorts(line)])
    return {"names": names, "shared": shared, "counts": counts.tolist(), "figures": figures}
