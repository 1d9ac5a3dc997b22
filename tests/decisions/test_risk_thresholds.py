"""Bounds and thresholds: scipy's tails, exact cases, and the promise over simulated rows."""

import math
import re

import pytest
import torch
from scipy import stats

from bayestune.decisions import (
    Promise,
    Threshold,
    band_thresholds,
    binomial_p_value,
    bounded_loss_p_value,
    class_thresholds,
    likely_start,
    losses_of,
    risk_bound,
    rows_for_rate,
    rows_needed,
    smallest_risk,
    threshold,
)
from bayestune.decisions.thresholds import check_enough


@pytest.mark.parametrize(("k", "n"), [(0, 45), (3, 45), (45, 45), (7, 3000), (200, 3000), (0, 0)])
@pytest.mark.parametrize("risk", [0.001, 0.05, 0.7])
def test_the_binomial_tail(k, n, risk):
    assert binomial_p_value(k, n, risk) == pytest.approx(stats.binom.cdf(k, n, risk), abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(0, 45), (3, 45), (20, 100)])
def test_the_bound_is_clopper_and_pearsons(k, n):
    exact = stats.beta.ppf(0.9, k + 1, n - k)
    assert risk_bound(k, n, 0.9) == pytest.approx(exact, abs=1e-9)


def test_rows_needed():
    assert rows_needed(Promise(0.05, 0.9)) == math.ceil(math.log(0.1) / math.log(0.95)) == 45
    assert rows_needed(Promise(0.01, 0.9)) == 230
    for errors in (1, 5):
        rows = rows_needed(Promise(0.05, 0.9), errors)
        assert (
            binomial_p_value(errors, rows, 0.05) <= 0.1 < binomial_p_value(errors, rows - 1, 0.05)
        )
    for rate in (0.0, 0.02, 0.04):
        rows = rows_for_rate(rate, Promise(0.05, 0.9))
        assert binomial_p_value(math.floor(rate * rows), rows, 0.05) <= 0.1
        assert binomial_p_value(math.floor(rate * rows / 3), rows // 3, 0.05) > 0.1
    assert rows_for_rate(0.05, Promise(0.05, 0.9)) is None
    assert smallest_risk(45, 0.9) == pytest.approx(risk_bound(0, 45, 0.9), abs=1e-9)


def test_the_p_value_of_costs_holds_and_is_near_the_binomial_for_errors():
    """P(p ≤ δ) ≤ δ for losses of mean α, whatever their law; it is no more than e times worse."""
    g = torch.Generator().manual_seed(0)
    mean, rows, runs = 0.2, 80, 4000
    for high in (1.0, 0.4):  # losses 0 or `high`
        drawn = (torch.rand(runs, rows, generator=g) < mean / high) * high
        p = [bounded_loss_p_value(total, rows, mean) for total in drawn.sum(1).tolist()]
        share = sum(value <= 0.1 for value in p) / runs
        assert share <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / runs)
    for errors in (0, 2, 5):
        exact = binomial_p_value(errors, 100, 0.1)
        assert (
            exact * (1 - 1e-9) <= bounded_loss_p_value(errors, 100, 0.1) <= math.e * exact + 1e-12
        )


def test_no_error_among_exactly_enough_rows():
    scores = torch.arange(45.0)
    found = threshold(scores, torch.zeros(45), Promise(0.05, 0.9))
    assert (found.acted, found.coverage, found.value) == (45, 1.0, 44.5)
    assert "acts on 45 of 45 rows; risk at most 0.05" in found.sentence()
    with pytest.raises(
        ValueError, match="got 44 rows to choose thresholds on; expected 45 or more"
    ):
        threshold(scores[:44], torch.zeros(44), Promise(0.05, 0.9))


def test_one_error_among_the_surest_stops_the_sequence_and_says_what_they_support():
    losses = torch.zeros(60)
    losses[0] = 1
    found = threshold(torch.arange(60.0), losses, Promise(0.05, 0.9))
    assert found.value is None
    assert not found.acts(torch.zeros(3)).any()
    assert found.supported == pytest.approx(stats.beta.ppf(0.9, 2, 44), abs=1e-9)
    assert "no threshold keeps the risk at 0.05" in found.sentence()
    assert found.needed == rows_for_rate(1 / 45, Promise(0.05, 0.9))
    assert f"{found.needed} rows" in found.sentence()
    hopeless = threshold(torch.arange(60.0), torch.ones(60), Promise(0.05, 0.9))
    assert hopeless.needed is None
    assert "no number of rows would" in hopeless.sentence()
    later = threshold(torch.arange(300.0), torch.cat([losses, torch.zeros(240)]), Promise(), 100)
    assert later.acted == 300  # begun where one error is no harm
    early = threshold(torch.arange(300.0), torch.cat([losses, torch.zeros(240)]), Promise())
    assert early.value is None


def test_the_threshold_is_the_last_before_the_first_failure():
    """Errors from row 100 on: the sequence must not go on beyond, nor pass over a failure."""
    scores = torch.arange(400.0)
    losses = (scores >= 100).double()
    found = threshold(scores, losses, Promise(0.05, 0.9), start=50)
    assert binomial_p_value(int(found.losses), found.acted, 0.05) <= 0.1
    step = (400 - 50) / 19
    assert 100 - step <= found.acted < 100 + step
    assert found.acts(scores).sum() == found.acted
    alternating = torch.zeros(400)
    alternating[60:80] = 1  # then good rows, so that later thresholds would pass again
    stopped = threshold(scores, alternating, Promise(0.05, 0.9), start=50)
    assert stopped.acted <= 60 + step


def test_equal_scores_are_acted_on_together():
    scores = torch.tensor([0.0] * 50 + [1.0] * 50)
    found = threshold(scores, torch.zeros(100), Promise(0.05, 0.9))
    assert found.acted == 100
    half = threshold(scores, (scores == 1).double(), Promise(0.05, 0.9))
    assert half.acted == 50
    constant = threshold(torch.zeros(100), torch.zeros(100), Promise(0.05, 0.9))
    assert constant.acted == 100
    assert 0 < constant.value < 1e-4


@pytest.mark.parametrize("shape", ["spread", "ties", "near ties", "all alike"])
def test_rounding_moves_no_row_across_its_threshold(shape):
    """λ keeps away from every row that it was found on, the last one and equal ones included."""
    g = torch.Generator().manual_seed(1)
    scores = torch.rand(200, generator=g, dtype=torch.float64)
    if shape == "ties":
        scores = (scores * 10).round() / 10
    if shape == "near ties":  # the same question twice, in other batches
        scores = torch.cat([scores[:100], scores[:100] + 1e-9 * torch.randn(100, generator=g)])
    if shape == "all alike":
        scores = torch.full((200,), 0.25, dtype=torch.float64)
    for last in range(60, 201, 7):
        losses = torch.zeros(200, dtype=torch.float64)
        losses[scores.argsort()[last:]] = 1
        found = threshold(scores, losses, Promise(0.05, 0.9))
        if found.value is None:
            assert shape in ("ties", "all alike")
            continue
        acts = scores <= found.value
        assert acts.sum() == found.acted
        for noise in (1e-6, -1e-6):
            assert (found.acts(scores * (1 + noise)) == acts).all()


def test_infinite_scores_are_never_acted_on():
    scores = torch.cat([torch.arange(50.0), torch.full((50,), torch.inf)])
    found = threshold(scores, torch.zeros(100), Promise(0.05, 0.9))
    assert (found.acted, found.rows) == (50, 100)
    few = threshold(scores[10:], torch.zeros(90), Promise(0.05, 0.9))
    assert few.value is None


@pytest.mark.parametrize("law", ["binomial", "costs"])
def test_the_promise(law):
    """R(λ) = 0.1 λ²; λ̂ breaks α = 0.05 in at most 10 % of runs, and is of use."""
    g = torch.Generator().manual_seed(3)
    runs, rows = 400, 400
    broken = acted = 0
    for _ in range(runs):
        scores = torch.rand(rows, generator=g)
        losses = (torch.rand(rows, generator=g) < 0.3 * scores**2).double()
        if law == "costs":
            losses = losses * (0.5 + torch.rand(rows, generator=g))  # 0.5 to 1.5, of mean 1
            losses = losses.clamp_max(1)
        found = threshold(scores, losses, Promise(0.05, 0.9), 200, bounded=law == "costs")
        value = found.value if found.value is not None else 0.0
        scale = 1.0 if law == "binomial" else 0.875  # the mean of min(1, U[0.5, 1.5])
        broken += 0.1 * value**2 * scale > 0.05
        acted += value
    assert broken / runs <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / runs)
    assert acted / runs > 0.25


def test_a_likely_start_leaves_rows_for_an_error():
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(200, generator=g)
    losses = (torch.rand(200, generator=g) < 0.02 + 0.2 * (scores > 0.8)).double()
    start = likely_start(scores, losses, 200, Promise(0.05, 0.9))
    assert 100 <= start <= 170
    assert likely_start(scores, losses, 45, Promise(0.05, 0.9)) == 45
    assert likely_start(scores, torch.ones(200), 400, Promise(0.05, 0.9)) >= 45


def test_classes_have_promises_of_their_own_that_hold_together():
    scores = torch.arange(200.0)
    choices = torch.arange(200) % 2
    losses = ((choices == 1) & (scores > 20)).double()
    found = class_thresholds(scores, losses, choices, Promise(0.05, 0.9), [None] * 3)
    assert found[0].acted == 100
    assert found[0].confidence == pytest.approx(1 - 0.1 / 3)
    assert found[1].value is None  # class 1 errs
    assert (found[2].value, found[2].rows, found[2].coverage) == (None, 0, 0.0)
    assert "67 rows acted on would" in found[2].sentence()
    assert "no number of rows would" in found[1].sentence()
    few = class_thresholds(
        scores, torch.zeros(200), (scores < 60).long(), Promise(0.05, 0.9), [None] * 2
    )
    assert few[1].value is not None
    fewer = class_thresholds(
        scores, torch.zeros(200), (scores < 40).long(), Promise(0.05, 0.9), [None] * 2
    )
    assert fewer[1].supported == pytest.approx(1 - 0.05 ** (1 / 40), abs=1e-6)
    assert "59 rows acted on would" in fewer[1].sentence()
    with pytest.raises(ValueError, match="got 50 rows to choose thresholds on; expected 67"):
        class_thresholds(scores[:100], losses[:100], choices[:100], Promise(0.05, 0.9), [None] * 3)


def test_bands_are_nested():
    scores = torch.arange(400.0)
    losses = torch.zeros(400)
    losses[200::4] = 1
    found = band_thresholds(scores, losses, {"act": 0.05, "flag": 0.2}, 0.9)
    assert list(found) == ["act", "flag"]
    assert 150 < found["act"].acted < 300 < found["flag"].acted
    assert found["act"].confidence == pytest.approx(0.95)
    with pytest.raises(ValueError, match="expected rising risks; put the strictest first"):
        band_thresholds(scores, losses, {"act": 0.2, "flag": 0.05}, 0.9)


def test_costs_are_of_choosing_the_column_where_the_row_is_right():
    costs = torch.tensor([[0.0, 1.0], [4.0, 0.0]])
    pairs = [(0, 0), (1, 0), (0, 1), (1, 1)]
    choices, labels = torch.tensor(pairs).T
    assert losses_of(choices, labels, costs).tolist() == [0, 0.25, 1, 0]
    assert losses_of(choices, labels).tolist() == [0, 1, 1, 0]
    for bad in (-costs, costs[:1], torch.zeros(2, 2), torch.ones(1, 1)):
        with pytest.raises(ValueError, match="got costs of shape"):
            losses_of(choices, labels, bad)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Promise(0.0), "got risk=0.0; expected a rate between 0 and 1"),
        (lambda: Promise(0.05, 1.0), "got confidence=1.0; expected 0.5 to less than 1"),
        (lambda: threshold(torch.zeros(3), torch.zeros(2), Promise()), "got scores and losses of"),
        (lambda: threshold(torch.zeros(50), torch.full((50,), 2.0), Promise()), "expected 0 or 1"),
        (lambda: threshold(torch.full((50,), torch.nan), torch.zeros(50), Promise()), "got NaN"),
    ],
)
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_threshold_of_nothing_covers_nothing():
    assert Threshold(None, 0.05, 0.9, 10, 0, 0.0, 0.2).coverage == 0


@pytest.mark.parametrize("rows", range(5, 45))
def test_the_smallest_risk_that_a_refusal_names_is_not_refused(rows):
    with pytest.raises(ValueError, match="or ask for") as refused:
        check_enough(rows, Promise(0.01, 0.9))
    named = float(re.search(r"ask for ([\d.]+),", str(refused.value))[1])
    check_enough(rows, Promise(named, 0.9))
