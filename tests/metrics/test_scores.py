"""Scores: closed forms, torchmetrics, exact invariances, refusals."""

import math
import subprocess
import sys
from itertools import permutations

import pytest
import torch
from scipy.stats import foldnorm
from torchmetrics.functional.classification import multiclass_calibration_error

from bayestune import metrics
from bayestune.metrics import Bins

FUNCTIONS = [
    metrics.accuracy,
    metrics.nll,
    metrics.brier,
    metrics.ece,
    metrics.ece_debiased,
    metrics.aurc,
]
TEXTBOOK = Bins(binning="textbook")


def calibrated(n, seed=0, sharpness=1.5):
    """Probabilities of four classes, and labels drawn from them."""
    g = torch.Generator().manual_seed(seed)
    p = (torch.randn(n, 4, generator=g, dtype=torch.float64) * sharpness).softmax(1)
    return p, torch.multinomial(p, 1, generator=g)[:, 0]


def two_class(confidences, right):
    """Rows with class 0 at the given confidence, the label 0 where right."""
    c = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([c, 1 - c], 1), torch.tensor([0 if r else 1 for r in right])


# Closed forms


def test_scores_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.25, 0.75, 0.0]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1])
    logs = math.log(0.5) + math.log(0.1) + math.log(0.75)
    squares = (0.25 + 0.09 + 0.04) + (0.01 + 0.81 + 0.64) + (0.0625 + 0.0625)
    assert metrics.accuracy(p, y) == pytest.approx(2 / 3)
    assert metrics.nll(p, y) == pytest.approx(-logs / 3)
    assert metrics.brier(p, y) == pytest.approx(squares / 3)
    assert metrics.ece(p, y) == pytest.approx((0.5 + 0.8 + 0.25) / 3)
    assert metrics.aurc(p, y) == pytest.approx((1 / 1 + 1 / 2 + 1 / 3) / 3)


def test_one_row():
    p, y = two_class([0.7], [True])
    expected = [1, -math.log(0.7), 0.18, 0.3, 0.3, 0]
    assert [f(p, y) for f in FUNCTIONS] == pytest.approx(expected)


def test_padding_changes_nothing():
    p, y = calibrated(50)
    padded = torch.nn.functional.pad(p, (0, 3))
    expected = [f(p, y) for f in FUNCTIONS]
    assert [f(padded, y) for f in FUNCTIONS] == pytest.approx(expected, abs=1e-15)


def test_nll_of_small_probabilities():
    assert metrics.nll(*two_class([1e-30], [True])) == pytest.approx(30 * math.log(10))
    assert metrics.nll(*two_class([1e-300], [True])) == pytest.approx(300 * math.log(10))
    least = torch.tensor([[5e-324, 1.0]], dtype=torch.float64)
    assert metrics.nll(least, torch.tensor([0])) == pytest.approx(1074 * math.log(2))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float64, 1074), (torch.float32, 149)])
def test_nll_of_probability_zero_is_the_least_of_its_type(dtype, bits):
    p = torch.tensor([[1.0, 0.0]], dtype=dtype)
    assert metrics.nll(p, torch.tensor([1])) == pytest.approx(bits * math.log(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_double(dtype):
    p = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=dtype)
    expected = -(math.log(0.75) + math.log(0.5)) / 2
    assert metrics.nll(p, torch.tensor([1, 0])) == pytest.approx(expected, rel=1e-12)


# Calibration


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ece_is_torchmetrics(bins, dtype):
    p, y = calibrated(500, seed=bins)
    p[:20] = torch.nn.functional.one_hot(y[:20], 4)  # confidence 1, right and wrong
    p[20:30] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    p[30:130] = 0
    p[30:130, 0] = (50 + torch.arange(100) // 2) / 100  # on and about the edges
    p[30:130, 1] = (50 - torch.arange(100) // 2) / 100
    p = p.to(dtype)
    reference = multiclass_calibration_error(p, y, num_classes=4, n_bins=bins, norm="l1").item()
    assert metrics.ece(p, y, Bins(bins)) == pytest.approx(reference, abs=1e-6)


def test_ece_where_the_binnings_differ():
    p, y = two_class([1.0, 0.95], [False, True])
    reference = multiclass_calibration_error(p, y, num_classes=2, n_bins=15, norm="l1").item()
    assert metrics.ece(p, y) == pytest.approx(0.525)
    assert reference == pytest.approx(0.525)
    assert metrics.ece(p, y, TEXTBOOK) == pytest.approx(0.475)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", range(8, 15))
def test_textbook_bins_are_closed_above(k, dtype):
    """At the edge k/15 and just below is one bin, whose gaps cancel; at it and just above, two."""
    edge = k / 15
    p, y = two_class([edge, edge - 0.01], [True, False])
    one = abs(1 - 2 * edge + 0.01) / 2
    assert metrics.ece(p.to(dtype), y, TEXTBOOK) == pytest.approx(one, abs=1e-6)
    p, y = two_class([edge, edge + 0.01], [True, False])
    two = (1 - edge + edge + 0.01) / 2
    assert metrics.ece(p.to(dtype), y, TEXTBOOK) == pytest.approx(two, abs=1e-6)


def test_bins_pool_rows():
    """0.61 and 0.65 share the bin (9/15, 10/15]: one right of two against 0.63."""
    p, y = two_class([0.61, 0.65], [True, False])
    assert metrics.ece(p, y) == pytest.approx(0.13)
    assert metrics.ece(p, y, TEXTBOOK) == pytest.approx(0.13)
    assert metrics.ece(p, y, Bins(1000)) == pytest.approx((0.39 + 0.65) / 2)


def test_debiased_is_the_folded_normal():
    std = math.sqrt(0.7 * 0.3 / 10)  # one bin, 7 of 10 right
    p, y = two_class([0.95] * 10, [True] * 7 + [False] * 3)
    bias = foldnorm(c=0.25 / std, scale=std).mean() - 0.25
    assert bias > 1e-3
    assert metrics.ece_debiased(p, y) == pytest.approx(0.25 - bias, abs=1e-12)
    p, y = two_class([0.72] * 10, [True] * 7 + [False] * 3)
    assert foldnorm(c=0.02 / std, scale=std).mean() > 2 * 0.02  # more bias than gap
    assert metrics.ece_debiased(p, y) == 0


def test_debiased_weighs_the_bins():
    right = [True] * 7 + [False] * 3 + [True] * 10 + [False] * 20
    p, y = two_class([0.95] * 10 + [0.72] * 30, right)
    parts = [(0.25, math.sqrt(0.021), 10), (0.72 - 1 / 3, math.sqrt(2 / 9 / 30), 30)]
    expected = sum((2 * g - foldnorm(c=g / s, scale=s).mean()) * n / 40 for g, s, n in parts)
    assert metrics.ece_debiased(p, y) == pytest.approx(expected, abs=1e-12)


def test_debiased_is_nearer_zero_on_calibrated_data():
    pairs = [calibrated(300, seed=seed) for seed in range(200)]
    plain = torch.tensor([metrics.ece(*pair) for pair in pairs])
    debiased = torch.tensor([metrics.ece_debiased(*pair) for pair in pairs])
    error = (plain - debiased).std() / math.sqrt(200)
    assert (plain - debiased).mean() > 20 * error  # paired
    assert debiased.mean() < 0.8 * plain.mean()
    assert debiased.min() >= 0


def test_debiased_is_the_plain_one_on_miscalibrated_data():
    p, _ = calibrated(3000, seed=3, sharpness=3)
    y = torch.randint(4, (3000,), generator=torch.Generator().manual_seed(4))
    plain = metrics.ece(p, y)
    assert plain > 0.4
    assert metrics.ece_debiased(p, y) == pytest.approx(plain, rel=0.03)


def test_reliability_adds_up_to_the_textbook_ece():
    p, y = calibrated(400)
    p[0] = torch.tensor([1.0, 0, 0, 0])
    diagram = metrics.reliability(p, y, bins=15)
    used = diagram.counts > 0
    assert diagram.counts.shape == (15,)
    assert diagram.counts.sum() == 400
    assert diagram.confidence[~used].isnan().all()
    assert diagram.accuracy[~used].isnan().all()
    centre = (torch.arange(15) + 0.5) / 15
    assert ((diagram.confidence - centre)[used].abs() <= 0.5 / 15 + 1e-12).all()
    share = diagram.counts.double() / 400
    gap = ((diagram.accuracy - diagram.confidence).abs() * share)[used].sum().item()
    assert gap == pytest.approx(metrics.ece(p, y, TEXTBOOK), abs=1e-12)
    right = (diagram.accuracy * share)[used].sum().item()
    assert right == pytest.approx(metrics.accuracy(p, y))


# AURC


@pytest.mark.parametrize(
    ("right", "expected"),
    [
        ([True] * 6 + [False] * 4, sum((k - 6) / k for k in range(7, 11)) / 10),
        ([False] * 4 + [True] * 6, (4 + sum(4 / k for k in range(5, 11))) / 10),
        ([True] * 10, 0),
    ],
)
def test_aurc_of_the_best_and_the_worst_order(right, expected):
    p, y = two_class([0.95 - 0.02 * i for i in range(10)], right)
    assert metrics.aurc(p, y) == pytest.approx(expected)


def test_aurc_of_constant_confidence_is_the_error_rate():
    p, y = two_class([0.7] * 10, [True] * 6 + [False] * 4)
    assert metrics.aurc(p, y) == pytest.approx(0.4)


def test_aurc_of_ties_is_the_mean_over_orders():
    tied = [True, False, True, False]
    orders = set(permutations(tied))
    values = []
    for order in orders:
        untied = [0.9, 0.8, 0.8 - 1e-9, 0.8 - 2e-9, 0.8 - 3e-9, 0.7]
        values.append(metrics.aurc(*two_class(untied, [True, *order, False])))
    p, y = two_class([0.9, 0.8, 0.8, 0.8, 0.8, 0.7], [True, *tied, False])
    assert metrics.aurc(p, y) == pytest.approx(sum(values) / len(orders), abs=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_row_order_changes_nothing(function):
    p, y = calibrated(200)
    p = (p * 8).round() / 8  # many ties
    p[:, 0] += 1 - p.sum(1)
    kept = (p >= 0).all(1).nonzero()[:, 0]
    order = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))]
    assert function(p[order], y[order]) == pytest.approx(function(p[kept], y[kept]), abs=1e-12)


# Errors


GOOD = torch.tensor([[0.5, 0.5], [0.2, 0.8]])
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("p", "y", "match"),
    [
        (GOOD[None], LABELS, r"shape \(1, 2, 2\).*expected \(N, C\).*average the draws"),
        (GOOD, LABELS[:1], r"labels of shape \(1,\)"),
        (GOOD, LABELS[:, None], r"labels of shape \(2, 1\)"),
        (GOOD[:0], LABELS[:0], r"labels of shape \(0,\).*not empty"),
        (GOOD, torch.tensor([0, 2]), r"labels from 0 to 2; expected integers in 0…1"),
        (GOOD, torch.tensor([-100, 1]), r"labels from -100 to 1"),
        (GOOD, torch.tensor([0.0, 1.0]), r"labels from 0.0 to 1.0; expected integers"),
        (GOOD * 1.0011, LABELS, "differs from 1 by 0.0011.*apply softmax"),
        (torch.tensor([[1.5, -0.5], [0.2, 0.8]]), LABELS, "least entry of -0.5"),
        (torch.tensor([[math.nan, 0.5], [0.2, 0.8]]), LABELS, "expected finite probabilities"),
        (torch.tensor([[math.inf, 0.5], [0.2, 0.8]]), LABELS, "expected finite probabilities"),
    ],
)
@pytest.mark.parametrize(
    "function",
    [
        *FUNCTIONS,
        metrics.reliability,
        metrics.summarise,
        lambda p, y: metrics.paired_bootstrap(GOOD, p, y),
    ],
)
def test_bad_rows_are_refused(function, p, y, match):
    with pytest.raises(ValueError, match=match):
        function(p, y)


def test_sums_within_the_tolerance_pass():
    assert metrics.accuracy(GOOD * 1.0009, LABELS) == 1


def test_bad_bins_are_refused():
    with pytest.raises(ValueError, match="got bins=0; expected 1 or more"):
        Bins(0)
    with pytest.raises(ValueError, match="got binning 'equal'; expected one of .*textbook"):
        Bins(binning="equal")


def test_import_is_light():
    heavy = "{'transformers', 'peft', 'matplotlib'} & set(sys.modules)"
    code = f"import sys, bayestune.metrics; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
