"""Rankings: brute force over pairs, scipy, exact cases, and the statistics of chance and of the intervals."""

import math

import pytest
import torch
from scipy.stats import mannwhitneyu

from bayestune import metrics
from bayestune.data import Question
from bayestune.evaluation import prediction_rows
from bayestune.posteriors import Prediction
from bayestune.selective import (
    SCORES,
    RiskCoverage,
    auroc,
    auroc_interval,
    error_auroc,
    is_right,
    risk_coverage,
    shift_auroc,
    uncertainty,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scored(n=200, levels=None, seed=0, gap=1.0):
    """Scores, higher for the positives; with `levels` only so many values, so that there are ties."""
    g = generator(seed)
    positive = torch.arange(n) % 3 == 0
    scores = torch.randn(n, generator=g, dtype=torch.float64) + gap * positive
    return ((scores * levels / 4).round() if levels else scores), positive


def answered(probabilities, answer, **fields):
    """A row of a point: all of its entropy is expected."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    total = torch.special.entr(p).sum().item()
    parts = {"total_entropy": total, "expected_entropy": total, "mutual_information": 0.0}
    return {
        "probabilities": list(probabilities),
        "answer": answer,
        "confidence": p.max().item(),
        **parts,
        **fields,
    }


# AUROC


@pytest.mark.parametrize("levels", [None, 2, 5])
def test_auroc_is_the_share_of_pairs_in_order(levels):
    scores, positive = scored(60, levels)
    a, b = scores[positive][:, None], scores[~positive][None]
    assert auroc(scores, positive) == pytest.approx(
        ((a > b).double() + 0.5 * (a == b)).mean().item(), abs=1e-15
    )


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("seed", range(3))
def test_auroc_is_the_u_statistic_of_scipy(levels, seed):
    scores, positive = scored(500, levels, seed)
    a, b = scores[positive].numpy(), scores[~positive].numpy()
    assert auroc(scores, positive) == pytest.approx(
        mannwhitneyu(a, b).statistic / (len(a) * len(b)), abs=1e-14
    )


def test_perfect_reversed_and_equal_scores_are_exact():
    positive = torch.tensor([False, False, True, True, True])
    assert auroc(positive.double(), positive) == 1.0
    assert auroc(-positive.double(), positive) == 0.0
    assert auroc(torch.full((5,), 0.1), positive) == 0.5
    assert auroc(torch.tensor([-math.inf, 0.0, 1.0, 2.0, math.inf]), positive) == 1.0


def test_only_the_order_counts_and_turning_it_round_mirrors():
    scores, positive = scored(100, 6)
    assert auroc(scores.exp(), positive) == auroc(scores, positive)
    assert auroc(-scores, positive) + auroc(scores, positive) == pytest.approx(1, abs=1e-15)
    assert auroc(scores, ~positive) + auroc(scores, positive) == pytest.approx(1, abs=1e-15)
    assert auroc(scores, positive.long()) == auroc(scores, positive)


def test_coin_flips_give_one_half_within_their_standard_error():
    n, trials = 90, 300
    found = [auroc(*scored(n, seed=seed, gap=0.0)) for seed in range(trials)]
    a, b = n / 3, 2 * n / 3
    std = math.sqrt((a + b + 1) / (12 * a * b))  # of U/(ab) without ties
    values = torch.tensor(found)
    assert abs(values.mean().item() - 0.5) < 4 * std / math.sqrt(trials)
    assert values.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * trials))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    truth, trials, level = 0.5 * (1 + math.erf(1.0 / 2)), 400, 0.9  # P(N(1, 1) > N(0, 1)) = Φ(1/√2)
    intervals = [auroc_interval(*scored(150, seed=seed), level=level) for seed in range(trials)]
    covered = sum(one.low <= truth <= one.high for one in intervals) / trials
    assert abs(covered - level) < 4 * math.sqrt(level * (1 - level) / trials)


def test_the_interval_is_delongs_with_ties():
    scores, positive = scored(40, 4)
    a, b = scores[positive], scores[~positive]
    wins = (a[:, None] > b).double() + 0.5 * (a[:, None] == b)
    variance = wins.mean(1).var() / len(a) + wins.mean(0).var() / len(b)
    value = wins.mean().item()
    half = 1.959963984540054 * variance.sqrt().item() / (value * (1 - value))
    ends = [1 / (1 + math.exp(-(math.log(value / (1 - value)) + sign * half))) for sign in (-1, 1)]
    interval = auroc_interval(scores, positive)
    assert [interval.value, interval.low, interval.high] == pytest.approx([value, *ends], abs=1e-12)
    assert interval.n == 40


def test_no_width_without_variance():
    positive = torch.tensor([False, False, True, True])
    assert auroc_interval(positive.double(), positive) == metrics.Interval(1.0, 1.0, 1.0, 4)
    assert auroc_interval(-positive.double(), positive) == metrics.Interval(0.0, 0.0, 0.0, 4)
    assert auroc_interval(torch.zeros(4), positive) == metrics.Interval(0.5, 0.5, 0.5, 4)


@pytest.mark.parametrize(
    ("scores", "positive", "message"),
    [
        ([1.0, 2.0], [1, 1], "got 2 positives and 0 negatives; expected 1 or more of each"),
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


def test_the_interval_refuses():
    with pytest.raises(
        ValueError, match="got 1 positives and 2 negatives; expected 2 or more of each"
    ):
        auroc_interval(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 0, 0]))
    with pytest.raises(ValueError, match="got level=95; expected a number between 0 and 1"):
        auroc_interval(torch.arange(4.0), torch.tensor([1, 0, 1, 0]), level=95)


# Uncertainty of rows


def test_the_scores_are_those_of_the_rows_that_are_written():
    logits = torch.randn(5, 6, 4, generator=generator())
    logits[:, 3, 3:] = -torch.inf
    questions = [
        Question(f"q{i}", "?", tuple("abcd"[: 3 if i == 3 else 4]), i % 3) for i in range(6)
    ]
    prediction = Prediction.of(logits)
    rows = prediction_rows(questions, prediction)
    assert torch.equal(uncertainty(rows, "one_minus_confidence"), 1 - prediction.confidence)
    for name in ("total_entropy", "expected_entropy", "mutual_information"):
        assert torch.equal(uncertainty(rows, name), getattr(prediction, name))
    assert is_right(rows).tolist() == [row["choice"] == row["answer"] for row in rows]
    most = torch.tensor([4.0, 4, 4, 3, 4, 4], dtype=torch.float64)
    assert torch.allclose(
        uncertainty(rows, "mutual_information", normalised=True), rows_of(rows) / most.log()
    )


def rows_of(rows):
    return torch.tensor([row["mutual_information"] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("score", ["one_minus_confidence", "total_entropy", "expected_entropy"])
def test_uniform_rows_of_any_number_of_options_are_equally_uncertain(score):
    rows = [answered([1 / c] * c, 0) for c in (2, 3, 4, 5)]
    assert uncertainty(rows, score, normalised=True).tolist() == pytest.approx([1] * 4, abs=1e-12)
    assert len(uncertainty(rows, score).unique()) == 4


def test_right_is_as_in_the_metrics():
    g = generator(3)
    p = torch.randint(1, 4, (50, 3), generator=g).double()
    p, y = p / p.sum(1, keepdim=True), torch.randint(3, (50,), generator=g)  # with ties for the top
    rows = [answered(p[i].tolist(), int(y[i])) for i in range(50)]
    assert is_right(rows).double().mean().item() == pytest.approx(metrics.accuracy(p, y))


def test_errors_by_hand():
    rows = [
        answered([0.9, 0.1], 0),
        answered([0.8, 0.2], 1),
        answered([0.3, 0.7], 1),
        answered([0.6, 0.4], 1),
    ]
    # Wrong: 0.2 and 0.4, right: 0.1 and 0.3. Of four pairs, three in order.
    assert [error_auroc(rows, score) for score in SCORES] == [0.75, 0.75, 0.75, 0.5]


def test_normalising_changes_the_order_only_between_unlike_numbers_of_options():
    two, four = [answered([0.6, 0.4], 0)], [answered([0.7, 0.1, 0.1, 0.1], 0)]
    assert (
        shift_auroc(four, two, "total_entropy", normalised=False) == 1.0
    )  # 0.940 nats against 0.673
    assert shift_auroc(four, two, "total_entropy") == 0.0  # 0.678 of log 4 against 0.971 of log 2
    wrong = [answered([0.6, 0.4], 1), *four]
    assert error_auroc(wrong, "total_entropy") == 0.0
    assert error_auroc(wrong, "total_entropy", normalised=True) == 1.0


def test_rows_of_the_same_kind_are_told_apart_by_chance_only():
    g = generator(5)
    n = 2000
    p = torch.randn(2 * n, 4, generator=g, dtype=torch.float64).softmax(1)
    rows = [answered(row, 0) for row in p.tolist()]
    std = math.sqrt((2 * n + 1) / (12 * n * n))
    for score in ("one_minus_confidence", "total_entropy", "expected_entropy"):
        assert abs(shift_auroc(rows[:n], rows[n:], score) - 0.5) < 4 * std


def test_calibrated_doubt_finds_errors_and_overwhelming_shift_is_found():
    g = generator(1)
    p = (2 * torch.randn(400, 4, generator=g, dtype=torch.float64)).softmax(1)
    y = torch.multinomial(p, 1, generator=g)[:, 0].tolist()
    rows = [answered(row, label) for row, label in zip(p.tolist(), y, strict=True)]
    assert error_auroc(rows, "one_minus_confidence") > 0.65
    assert shift_auroc([answered([0.25] * 4, 0)] * 9, rows, "total_entropy") == 1.0


def test_rows_are_refused():
    rows = [answered([0.9, 0.1], 0), answered([0.8, 0.2], 0)]
    with pytest.raises(
        ValueError,
        match=r"got score 'luck'; expected one of \('one_minus_confidence', 'total_entropy'",
    ):
        uncertainty(rows, "luck")
    with pytest.raises(
        ValueError, match="got a row without 'total_entropy'; expected what `evaluate` writes"
    ):
        uncertainty([{"probabilities": [1.0], "answer": 0}], "total_entropy")
    with pytest.raises(ValueError, match="got a row of one option; expected two or more"):
        uncertainty([answered([1.0], 0)], "total_entropy", normalised=True)
    with pytest.raises(ValueError, match="got 0 positives and 2 negatives"):
        error_auroc(rows, "total_entropy")
    with pytest.raises(ValueError, match="got 0 positives and 2 negatives"):
        shift_auroc([], rows, "total_entropy")


# Risk and coverage


@pytest.mark.parametrize("levels", [1, 3, 10, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_the_mean_risk_is_the_aurc(levels, seed):
    g = generator(seed)
    top = 0.5 + 0.5 * torch.randint(1, levels + 1, (157,), generator=g).double() / (levels + 1)
    p, y = torch.stack([top, 1 - top], 1), torch.randint(2, (157,), generator=g)
    curve = risk_coverage(top, y == 0)
    assert curve.aurc == pytest.approx(metrics.aurc(p, y), abs=1e-14)
    assert curve.risk[-1].item() == pytest.approx(1 - metrics.accuracy(p, y), abs=1e-15)
    assert torch.equal(curve.coverage, torch.arange(1, 158).double() / 157)


def test_ties_are_the_mean_over_all_their_orders():
    from itertools import permutations

    confidence, right = torch.tensor([0.9, 0.7, 0.7, 0.7, 0.2]), torch.tensor([0, 1, 0, 1, 1])
    orders = [torch.tensor([0, *middle, 4]) for middle in permutations((1, 2, 3))]
    curves = [(1 - right[order]).double().cumsum(0) / torch.arange(1, 6) for order in orders]
    assert torch.allclose(
        risk_coverage(confidence, right).risk, torch.stack(curves).mean(0), atol=1e-15
    )
    shuffled = torch.tensor([3, 4, 0, 2, 1])
    assert torch.equal(
        risk_coverage(confidence[shuffled], right[shuffled]).risk,
        risk_coverage(confidence, right).risk,
    )


def test_excess_is_nothing_for_the_best_order_and_by_hand_for_the_worst():
    right = torch.tensor([1, 1, 0, 1, 0, 0, 1])
    assert risk_coverage(right.double(), right).excess_aurc == pytest.approx(0, abs=1e-15)
    worst = risk_coverage(1 - right.double(), right)
    best = (1 / 5 + 2 / 6 + 3 / 7) / 7
    assert worst.excess_aurc == pytest.approx(
        (1 + 1 + 1 + 3 / 4 + 3 / 5 + 3 / 6 + 3 / 7) / 7 - best
    )
    for flags in (torch.ones(6), torch.zeros(6)):
        assert risk_coverage(torch.arange(6.0), flags).excess_aurc == pytest.approx(0, abs=1e-15)


def test_the_excess_tends_to_the_closed_form_of_the_literature():
    n, rate = 200_000, 0.3
    curve = risk_coverage(torch.ones(n), torch.arange(n) >= rate * n)
    assert curve.excess_aurc == pytest.approx(
        rate - (rate + (1 - rate) * math.log(1 - rate)), abs=1e-4
    )


def test_accuracy_at_a_coverage():
    curve = RiskCoverage(torch.arange(1, 101).double() / 100, torch.arange(1, 101).double() / 1000)
    assert curve.accuracy_at(1.0) == pytest.approx(0.9)
    assert curve.accuracy_at(0.07) == pytest.approx(0.993)  # 0.07·100 > 7 in floating point
    assert curve.accuracy_at(0.071) == pytest.approx(0.992)
    assert curve.accuracy_at(1e-12) == pytest.approx(0.999)


@pytest.mark.parametrize("coverage", [0.0, -0.1, 1.1, math.nan])
def test_no_such_coverage(coverage):
    with pytest.raises(ValueError, match=r"got coverage .*; expected a share in \(0, 1\]"):
        risk_coverage(torch.tensor([0.5]), torch.tensor([1])).accuracy_at(coverage)


def test_risk_coverage_refuses():
    with pytest.raises(
        ValueError, match=r"got confidences and correctness of shapes \(2,\) and \(3,\)"
    ):
        risk_coverage(torch.ones(2), torch.ones(3))
    with pytest.raises(
        ValueError, match="got confidences and correctness from 0.5 to 0.5; expected flags"
    ):
        risk_coverage(torch.ones(1), torch.tensor([0.5]))
