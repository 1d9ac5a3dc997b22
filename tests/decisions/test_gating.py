"""A gate's figures: brute force and exact cases."""

import math

import pytest
import torch

from bayestune.decisions import class_figures, free_baselines, gate, macro_f1
from bayestune.metrics import aurc, confusion


def some_rows(count=101, seed=0):
    g = torch.Generator().manual_seed(seed)
    p = (3 * torch.randn(count, 3, generator=g, dtype=torch.float64)).softmax(-1)
    return p, torch.multinomial(p, 1, generator=g)[:, 0]


def test_brute_force():
    p, labels = some_rows()
    confidence, choice = p.max(-1)
    order = confidence.argsort(descending=True)
    wrong = (choice != labels).double()[order]
    risks = [wrong[: k + 1].mean().item() for k in range(101)]
    got = gate(p, labels)
    assert got.aurc == pytest.approx(aurc(p, labels))
    assert got.augrc == pytest.approx(
        sum(wrong[: k + 1].sum().item() / 101 for k in range(101)) / 101
    )
    assert got.risk_at_coverage_80 == pytest.approx(risks[80])  # ⌈0.8 · 101⌉ = 81 rows
    assert got.coverage_at_risk_5 == max(k + 1 for k in range(101) if risks[k] <= 0.05) / 101
    for level, count, acted in (
        (0.8, got.wrong_at_80, got.acted_at_80),
        (0.9, got.wrong_at_90, got.acted_at_90),
    ):
        rows = [i for i in range(101) if confidence[i] >= level]
        assert acted == len(rows)
        assert count == sum(int(choice[i] != labels[i]) for i in rows)
    assert got.confidently_wrong == got.wrong_at_90 / 101


def test_another_score_changes_the_curves_and_not_the_counts():
    p, labels = some_rows()
    wrong = p.argmax(-1) != labels
    best = gate(p, labels, wrong.double())
    worst = gate(p, labels, -wrong.double())
    assert best.wrong_at_90 == worst.wrong_at_90 == gate(p, labels).wrong_at_90
    right = 1 - wrong.double().mean().item()
    assert best.coverage_at_risk_5 == right  # ties end there
    assert worst.coverage_at_risk_5 == 0
    assert best.augrc < gate(p, labels).augrc < worst.augrc


def test_a_score_without_information_has_half_the_error_rate():
    p, labels = some_rows(2000)
    got = gate(p, labels, torch.zeros(2000))
    rate = (p.argmax(-1) != labels).double().mean().item()
    assert got.augrc == pytest.approx(rate / 2, rel=0.01)
    assert got.aurc == pytest.approx(rate)


def test_confusion_and_classes():
    p, labels = some_rows(300)
    choice = p.argmax(-1)
    table = confusion(choice, labels, 3)
    assert table.sum() == 300
    assert table[0, 2] == ((labels == 0) & (choice == 2)).sum()
    for index, got in enumerate(class_figures(p, labels)):
        assert (got.rows, got.chosen) == ((labels == index).sum(), (choice == index).sum())
        hits = table[index, index].item()
        assert (got.precision, got.recall) == (hits / got.chosen, hits / got.rows)
        assert got.f1 == pytest.approx(2 / (1 / got.precision + 1 / got.recall))
    known = class_figures(p, labels)
    assert macro_f1(known) == pytest.approx(sum(got.f1 for got in known) / 3)
    surely = sum(got.wrong_at_90 for got in class_figures(p, labels))
    assert surely == gate(p, labels).wrong_at_90
    never = class_figures(torch.tensor([[0.9, 0.1]]), torch.tensor([0]))[1]
    assert math.isnan(never.precision)
    assert math.isnan(never.recall)
    assert math.isnan(never.f1)
    both = class_figures(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]))
    assert math.isnan(both[1].precision)
    assert both[1].recall == 0
    assert both[1].f1 == 0
    assert both[0].f1 == 2 / 3
    assert macro_f1(both) == 1 / 3
    assert macro_f1([both[0], never]) == 2 / 3


def test_baselines():
    got = free_baselines(torch.tensor([1, 1, 0, 1]), torch.tensor([2, 4, 4, 4]))
    assert got == {"chance": (0.5 + 3 * 0.25) / 4, "majority": 0.75}


def test_refusals():
    with pytest.raises(ValueError, match=r"got shapes \(2, 2\) and \(3,\); expected \(N, C\)"):
        gate(torch.full((2, 2), 0.5), torch.zeros(3, dtype=torch.long))
