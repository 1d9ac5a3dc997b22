"""Figures of a gate: what acting on the confident rows lets through, by threshold and by class."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayestune.errors import Refusal
from bayestune.metrics import confusion, precision_recall_f1, risk_coverage

_SURE = 0.9  # confidence from which a wrong answer is called confidently wrong


@dataclass(frozen=True)
class Gate:
    """What a gate on a score lets through, over N rows.

    Args:
        wrong_at_80: wrong answers with a confidence of 0.8 or more, a count.
        wrong_at_90: the same of 0.9.
        acted_at_80: rows with a confidence of 0.8 or more.
        acted_at_90: the same of 0.9.
        coverage_at_risk_5: the largest share of rows, taken in the order of the score, whose error
            rate is at most 5 % (on these rows: not a promise).
        risk_at_coverage_80: the error rate among the first 80 % of the rows.
        aurc: mean over coverages of the error rate among the rows acted on.
        augrc: mean over coverages of P(acted on and wrong); half the error rate for a score
            without any information.
        confidently_wrong: wrong with a confidence of 0.9 or more, as a share of all rows.
    """

    wrong_at_80: int
    wrong_at_90: int
    acted_at_80: int
    acted_at_90: int
    coverage_at_risk_5: float
    risk_at_coverage_80: float
    aurc: float
    augrc: float
    confidently_wrong: float


def gate(probabilities: Tensor, labels: Tensor, score: Tensor | None = None) -> Gate:
    """The figures of a gate on N rows.

    Args:
        probabilities: p̄ (N, C).
        labels: y (N,).
        score: (N,), small where one acts first; 1 − confidence unless given. Counts at a confidence
            do not depend on it.

    >>> p = torch.tensor([[0.95, 0.05], [0.85, 0.15], [0.6, 0.4], [0.3, 0.7]])
    >>> found = gate(p, torch.tensor([0, 1, 0, 1]))
    >>> found.wrong_at_80, found.wrong_at_90, found.coverage_at_risk_5, round(found.augrc, 4)
    (1, 0, 0.25, 0.1875)

    References:
        AURC: Geifman, Uziel, El-Yaniv (2019), https://arxiv.org/abs/1805.08206; AUGRC: Traub et al.
        (2024), https://arxiv.org/abs/2407.01032.
    """
    _check(probabilities, labels)
    confidence, choice = probabilities.double().max(-1)
    wrong = choice != labels
    sureness = confidence if score is None else -score.double()
    risks = risk_coverage(sureness, ~wrong)
    num_rows = len(labels)
    coverage = torch.arange(1, num_rows + 1, dtype=torch.float64) / num_rows
    # Rows of one score are acted on together, so a coverage ends where a tie ends.
    ranked = sureness.sort(descending=True).values
    ends = torch.cat([ranked[1:] < ranked[:-1], torch.ones(1, dtype=torch.bool)])
    allowed = coverage[(risks <= 0.05 + 1e-12) & ends]
    wrong_at = {level: int((wrong & (confidence >= level)).sum()) for level in (0.8, _SURE)}
    return Gate(
        wrong_at_80=wrong_at[0.8],
        wrong_at_90=wrong_at[_SURE],
        acted_at_80=int((confidence >= 0.8).sum()),
        acted_at_90=int((confidence >= _SURE).sum()),
        coverage_at_risk_5=allowed.max().item() if len(allowed) else 0.0,
        risk_at_coverage_80=risks[-(-4 * num_rows // 5) - 1].item(),
        aurc=risks.mean().item(),
        augrc=(risks * coverage).mean().item(),
        confidently_wrong=wrong_at[_SURE] / num_rows,
    )


@dataclass(frozen=True)
class ClassFigures:
    """One class on N rows.

    Args:
        rows: whose right answer it is.
        chosen: that it was chosen for.
        precision: share of the chosen that are right; NaN if it was never chosen.
        recall: share of its rows that were found; NaN if it has none.
        f1: harmonic mean of the two, 2 hits / (rows + chosen); 0 if it was never chosen rightly,
            NaN if it has no rows and was never chosen.
        wrong_at_90: choices of it that are wrong with a confidence of 0.9 or more.
    """

    rows: int
    chosen: int
    precision: float
    recall: float
    f1: float
    wrong_at_90: int


def class_figures(probabilities: Tensor, labels: Tensor) -> list[ClassFigures]:
    """Figures of each of the C classes, for rows whose options mean the same.

    Args:
        probabilities: p̄ (N, C).
        labels: y (N,).

    >>> p = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.3, 0.7]])
    >>> class_figures(p, torch.tensor([0, 1, 1]))[1]
    ClassFigures(rows=2, chosen=1, precision=1.0, recall=0.5, f1=0.666..., wrong_at_90=0)
    """
    _check(probabilities, labels)
    confidence, choice = probabilities.double().max(-1)
    table = confusion(choice, labels, probabilities.shape[1])  # right answers by choices
    surely_wrong = choice[(choice != labels) & (confidence >= _SURE)]
    wrong = torch.bincount(surely_wrong, minlength=len(table)).tolist()
    rows = table.sum(1).tolist()
    chosen = table.sum(0).tolist()
    shares = precision_recall_f1(table).tolist()
    figures = []
    for index, (precision, recall, f1) in enumerate(shares):
        figures.append(
            ClassFigures(rows[index], chosen[index], precision, recall, f1, wrong[index])
        )
    return figures


def macro_f1(figures: Sequence[ClassFigures]) -> float:
    """The mean F1 of the classes that have rows or were chosen; NaN if there are none.

    >>> macro_f1([ClassFigures(1, 1, 1.0, 1.0, 1.0, 0), ClassFigures(1, 0, 0.0, 0.0, 0.0, 0)])
    0.5
    """
    defined = [each.f1 for each in figures if each.rows or each.chosen]
    return sum(defined) / len(defined) if defined else float("nan")


def free_baselines(labels: Tensor, num_options: Tensor) -> dict[str, float]:
    """Accuracies that cost no model: a guess among each row's options, and the commonest answer.

    Beside them stand always act (coverage 1, the error rate as risk) and always ask (coverage 0).

    Args:
        labels: y (N,).
        num_options: how many options each row has, (N,).

    >>> free_baselines(torch.tensor([0, 0, 1]), torch.tensor([2, 2, 4]))
    {'chance': 0.4166..., 'majority': 0.6666...}
    """
    majority = torch.bincount(labels.long()).max().item() / len(labels)
    return {"chance": (1 / num_options.double()).mean().item(), "majority": majority}


def _check(probabilities: Tensor, labels: Tensor) -> None:
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or len(labels) == 0:
        got = f"shapes {tuple(probabilities.shape)} and {tuple(labels.shape)}"
        raise Refusal(f"got {got}; expected (N, C) and (N,), not empty; give a label for each row")
