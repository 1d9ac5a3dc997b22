"""Rankings: brute force over pairs, scipy, exact cases, and chance within its standard error."""

import math
from itertools import permutations

import pytest
import torch
from scipy.stats import mannwhitneyu

from bayestune import metrics
from bayestune.data import Question
from bayestune.evaluation import prediction_rows
from bayestune.metrics import SCORES, auroc, error_auroc, risk_coverage, shift_auroc, uncertainty
from bayestune.posteriors import Prediction


def scored(n, levels=None, seed=0, gap=1.0):
    """Scores, higher for the positives; with `levels`, of few values, so that there are ties."""
    g = torch.Generator().manual_seed(seed)
    positive = torch.arange(n) % 3 == 0
    scores = torch.randn(n, generator=g, dtype=torch.float64) + gap * positive
    return ((scores * levels / 4).round() if levels else scores), positive


def answered(probabilities, answer):
    """A row of a point: all of its entropy is expected."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    total = torch.special.entr(p).sum().item()
    return {
        "probabilities": list(probabilities),
        "answer": answer,
        "confidence": p.max().item(),
        "total_entropy": total,
        "expected_entropy": total,
        "mutual_information": 0.0,
    }


# AUROC


@pytest.mark.parametrize("levels", [None, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_auroc_is_the_share_of_pairs_in_order(levels, seed):
    scores, positive = scored(60, levels, seed)
    a = scores[positive]
    b = scores[~positive]
    wins = (a[:, None] > b).double() + 0.5 * (a[:, None] == b)
    assert auroc(scores, positive) == pytest.approx(wins.mean().item(), abs=1e-15)
    statistic = mannwhitneyu(a.numpy(), b.numpy()).statistic
    assert auroc(scores, positive) == pytest.approx(statistic / (len(a) * len(b)), abs=1e-14)


def test_perfect_reversed_and_equal_scores_are_exact():
    positive = torch.tensor([False, False, True, True, True])
    assert auroc(positive.double(), positive) == 1.0
    assert auroc(-positive.double(), positive) == 0.0
    assert auroc(torch.full((5,), 0.1), positive) == 0.5
    assert auroc(torch.tensor([-math.inf, 0.0, 1.0, 2.0, math.inf]), positive) == 1.0


def test_only_the_order_counts_and_turning_it_round_mirrors():
    scores, positive = scored(100, 6)
    value = auroc(scores, positive)
    assert auroc(scores.exp(), positive.long()) == value
    assert auroc(-scores, positive) + value == pytest.approx(1, abs=1e-15)
    assert auroc(scores, ~positive) + value == pytest.approx(1, abs=1e-15)


def test_coin_flips_give_one_half_within_their_standard_error():
    trials = 300
    values = torch.tensor([auroc(*scored(90, seed=seed, gap=0.0)) for seed in range(trials)])
    std = math.sqrt((30 + 60 + 1) / (12 * 30 * 60))  # of U/(ab) without ties
    assert abs(values.mean().item() - 0.5) < 4 * std / math.sqrt(trials)
    assert values.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * trials))


@pytest.mark.parametrize(
    ("scores", "positive", "message"),
    [
        ([1.0, 2.0], [1, 1], "got 2 positives and 0 negatives; expected some of each"),
        ([1.0, 2.0], [0, 0], "got 0 positives and 2 negatives"),
        ([1.0, 2.0], [1], r"shapes \(2,\) and \(1,\); expected \(N,\)"),
        ([], [], "expected .* not empty"),
        ([[1.0]], [[1]], r"expected \(N,\) and \(N,\)"),
        ([1.0, math.nan], [0, 1], "with NaN; expected numbers that have an order"),
        ([1.0, 2.0], [0, 2], "from 0 to 2; expected flags 0 or 1"),
    ],
)
def test_auroc_refuses(scores, positive, message):
    with pytest.raises(ValueError, match=message):
        auroc(torch.tensor(scores), torch.tensor(positive))


# Uncertainty of rows


def test_the_scores_are_those_of_the_rows_that_are_written():
    logits = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(0))
    logits[:, 3, 3:] = -torch.inf
    options = torch.tensor([4, 4, 4, 3, 4, 4])
    questions = [Question(f"q{i}", "?", tuple("abcd"[:n]), i % 3) for i, n in enumerate(options)]
    prediction = Prediction.of(logits)
    rows = prediction_rows(questions, prediction)
    assert torch.equal(uncertainty(rows, "one_minus_confidence"), 1 - prediction.confidence)
    for name in SCORES[1:]:
        value = getattr(prediction, name)
        assert torch.equal(uncertainty(rows, name), value)
        normalised = uncertainty(rows, name, normalised=True)
        assert torch.allclose(normalised, value / options.double().log())
    assert metrics.is_right(rows).tolist() == [row["choice"] == row["answer"] for row in rows]


@pytest.mark.parametrize("score", SCORES[:3])
def test_uniform_rows_of_any_number_of_options_are_equally_uncertain(score):
    rows = [answered([1 / c] * c, 0) for c in (2, 3, 4, 5)]
    assert uncertainty(rows, score, normalised=True).tolist() == pytest.approx([1] * 4, abs=1e-12)
    assert len(uncertainty(rows, score).unique()) == 4


def test_right_is_as_in_the_accuracy():
    g = torch.Generator().manual_seed(3)
    p = torch.randint(1, 4, (50, 3), generator=g).double()  # with ties for the top
    p /= p.sum(1, keepdim=True)
    y = torch.randint(3, (50,), generator=g)
    rows = [answered(p[i].tolist(), int(y[i])) for i in range(50)]
    assert metrics.is_right(rows).double().mean().item() == pytest.approx(metrics.accuracy(p, y))


def test_errors_by_hand():
    """Wrong have doubts of 0.2 and 0.4, right 0.1 and 0.3: of four pairs, three are in order."""
    right = [answered([0.9, 0.1], 0), answered([0.3, 0.7], 1)]
    wrong = [answered([0.8, 0.2], 1), answered([0.6, 0.4], 1)]
    assert [error_auroc(right + wrong, score) for score in SCORES] == [0.75, 0.75, 0.75, 0.5]


def test_shift_compares_shares_of_the_most():
    """0.940 nats of log 4 against 0.673 nats of log 2."""
    two = [answered([0.6, 0.4], 0)]
    four = [answered([0.7, 0.1, 0.1, 0.1], 0)]
    assert shift_auroc(four, two, "total_entropy") == 0.0
    assert uncertainty(four, "total_entropy") > uncertainty(two, "total_entropy")


def test_rows_of_the_same_kind_are_told_apart_by_chance_only():
    n = 2000
    g = torch.Generator().manual_seed(5)
    p = torch.randn(2 * n, 4, generator=g, dtype=torch.float64).softmax(1)
    rows = [answered(row, 0) for row in p.tolist()]
    std = math.sqrt((2 * n + 1) / (12 * n * n))
    for score in SCORES[:3]:
        assert abs(shift_auroc(rows[:n], rows[n:], score) - 0.5) < 4 * std


def test_calibrated_doubt_finds_errors_and_overwhelming_shift_is_found():
    g = torch.Generator().manual_seed(1)
    p = (2 * torch.randn(400, 4, generator=g, dtype=torch.float64)).softmax(1)
    y = torch.multinomial(p, 1, generator=g)[:, 0].tolist()
    rows = [answered(row, label) for row, label in zip(p.tolist(), y, strict=True)]
    assert error_auroc(rows, "one_minus_confidence") > 0.65
    assert shift_auroc([answered([0.25] * 4, 0)] * 9, rows, "total_entropy") == 1.0


def test_rows_are_refused():
    with pytest.raises(ValueError, match=r"got score 'luck'; expected one of \('one_minus_conf"):
        uncertainty([], "luck")
    with pytest.raises(ValueError, match="got a row without 'total_entropy'; expected what `eval"):
        uncertainty([{"probabilities": [1.0], "answer": 0}], "total_entropy")
    with pytest.raises(ValueError, match="got a row of one option; expected two or more"):
        uncertainty([answered([1.0], 0)], "total_entropy", normalised=True)


# Risk and coverage


@pytest.mark.parametrize("levels", [1, 3, 10, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_the_mean_risk_is_the_aurc(levels, seed):
    g = torch.Generator().manual_seed(seed)
    top = 0.5 + 0.5 * torch.randint(1, levels + 1, (157,), generator=g).double() / (levels + 1)
    p = torch.stack([top, 1 - top], 1)
    y = torch.randint(2, (157,), generator=g)
    risk = risk_coverage(top, y == 0)
    assert risk.mean().item() == pytest.approx(metrics.aurc(p, y), abs=1e-14)
    assert risk[-1].item() == pytest.approx(1 - metrics.accuracy(p, y), abs=1e-15)


def test_ties_are_the_mean_over_all_their_orders():
    confidence = torch.tensor([0.9, 0.7, 0.7, 0.7, 0.2])
    right = torch.tensor([0, 1, 0, 1, 1])
    orders = [torch.tensor([0, *middle, 4]) for middle in permutations((1, 2, 3))]
    risks = [(1 - right[order]).double().cumsum(0) / torch.arange(1, 6) for order in orders]
    risk = risk_coverage(confidence, right)
    assert torch.allclose(risk, torch.stack(risks).mean(0), atol=1e-15)
    shuffled = torch.tensor([3, 4, 0, 2, 1])
    assert torch.equal(risk_coverage(confidence[shuffled], right[shuffled]), risk)


def test_risk_coverage_refuses():
    with pytest.raises(ValueError, match=r"got confidences and correctness of shapes \(2,\) and"):
        risk_coverage(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="got confidences and correctness from 0.5 to 0.5"):
        risk_coverage(torch.ones(1), torch.tensor([0.5]))
