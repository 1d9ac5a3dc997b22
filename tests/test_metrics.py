"""Metrics: closed forms, torchmetrics, exact invariances, and the statistics of the intervals."""

import math
import subprocess
import sys
from dataclasses import astuple

import pytest
import torch
from scipy.stats import foldnorm
from torchmetrics.functional.classification import multiclass_calibration_error

from bayestune import metrics

KEYS = ["accuracy", "nll", "brier", "ece", "ece_debiased", "aurc"]
FUNCTIONS = [
    metrics.accuracy,
    metrics.nll,
    metrics.brier,
    metrics.ece,
    metrics.ece_debiased,
    metrics.aurc,
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def calibrated(n, seed=0, classes=4, sharpness=1.5):
    """Probabilities, and labels that are drawn from them."""
    g = generator(seed)
    p = (torch.randn(n, classes, generator=g, dtype=torch.float64) * sharpness).softmax(1)
    return p, torch.multinomial(p, 1, generator=g)[:, 0]


def two_class(confidences, right):
    """Rows with class 0 at the given confidence, the label 0 where right."""
    c = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([c, 1 - c], 1), torch.tensor([0 if r else 1 for r in right])


# Closed forms


def test_scores_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.25, 0.75, 0.0]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1])
    assert metrics.accuracy(p, y) == pytest.approx(2 / 3)
    assert metrics.nll(p, y) == pytest.approx(-(math.log(0.5) + math.log(0.1) + math.log(0.75)) / 3)
    assert metrics.brier(p, y) == pytest.approx(
        (0.25 + 0.09 + 0.04 + 0.01 + 0.81 + 0.64 + 0.0625 + 0.0625) / 3
    )
    assert metrics.ece(p, y) == pytest.approx((0.5 + 0.8 + 0.25) / 3)
    assert metrics.aurc(p, y) == pytest.approx((1 / 1 + 1 / 2 + 1 / 3) / 3)


def test_padding_changes_nothing():
    p, y = calibrated(50)
    padded = torch.nn.functional.pad(p, (0, 3))
    assert [f(padded, y) for f in FUNCTIONS] == pytest.approx(
        [f(p, y) for f in FUNCTIONS], abs=1e-15
    )


def test_nll_of_probability_zero_is_the_documented_clip():
    p, y = two_class([1.0], [False])
    assert metrics.nll(p, y) == pytest.approx(126 * math.log(2))
    p, y = two_class([1e-30], [True])
    assert metrics.nll(p, y) == pytest.approx(30 * math.log(10))


def test_brier_of_the_worst_is_two():
    assert metrics.brier(*two_class([1.0], [False])) == 2


def test_one_row():
    p, y = two_class([0.7], [True])
    got = [f(p, y) for f in FUNCTIONS]
    assert got == pytest.approx([1, -math.log(0.7), 0.18, 0.3, 0.3, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_double(dtype):
    p = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=dtype)
    assert metrics.nll(p, torch.tensor([1, 0])) == pytest.approx(
        -(math.log(0.75) + math.log(0.5)) / 2, rel=1e-12
    )


# Calibration


@pytest.mark.parametrize("bins", [1, 5, 10, 15, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ece_is_torchmetrics(bins, dtype):
    p, y = calibrated(500, seed=bins)
    p[:20] = torch.nn.functional.one_hot(y[:20], 4)  # confidence 1, right and wrong
    p[20:30] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    p[30:130, :2], p[30:130, 2:] = 0, 0
    for i in range(100):  # on and about the edges
        p[30 + i, 0], p[30 + i, 1] = (50 + i // 2) / 100, (50 - i // 2) / 100
    p = p.to(dtype)
    reference = multiclass_calibration_error(p, y, num_classes=4, n_bins=bins, norm="l1").item()
    assert metrics.ece(p, y, bins=bins) == pytest.approx(reference, abs=1e-6)


def test_ece_where_the_binnings_differ():
    p, y = two_class([1.0, 0.95], [False, True])
    reference = multiclass_calibration_error(p, y, num_classes=2, n_bins=15, norm="l1").item()
    assert metrics.ece(p, y) == pytest.approx(0.525)
    assert reference == pytest.approx(0.525)
    assert metrics.ece(p, y, binning="textbook") == pytest.approx(0.475)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", range(8, 15))
def test_textbook_bins_are_closed_above(k, dtype):
    # At the edge k/15 and just below: one bin, the gaps cancel. At the edge and just above: two bins.
    edge = k / 15
    p, y = two_class([edge, edge - 0.01], [True, False])
    assert metrics.ece(p.to(dtype), y, binning="textbook") == pytest.approx(
        abs(1 - 2 * edge + 0.01) / 2, abs=1e-6
    )
    p, y = two_class([edge, edge + 0.01], [True, False])
    assert metrics.ece(p.to(dtype), y, binning="textbook") == pytest.approx(
        (1 - edge + edge + 0.01) / 2, abs=1e-6
    )


def test_bins_pool_rows():
    # 0.61 and 0.65 share the bin (9/15, 10/15]: one right of two against 0.63. Binned singly it would be (0.39+0.65)/2.
    p, y = two_class([0.61, 0.65], [True, False])
    for binning in metrics.BINNINGS:
        assert metrics.ece(p, y, binning=binning) == pytest.approx(0.13)
    assert metrics.ece(p, y, bins=1000) == pytest.approx(0.52)


def test_debiased_is_the_folded_normal():
    # One bin, 7 of 10 right at 0.72: gap 0.02, std √(0.21/10).
    p, y = two_class([0.72] * 10, [True] * 7 + [False] * 3)
    mean, std = 0.02, math.sqrt(0.021)
    bias = foldnorm(c=mean / std, scale=std).mean() - mean
    assert bias > mean  # clipped
    assert metrics.ece_debiased(p, y) == 0
    p, y = two_class([0.95] * 10, [True] * 7 + [False] * 3)
    bias = foldnorm(c=0.25 / std, scale=std).mean() - 0.25
    assert bias > 1e-3
    assert metrics.ece_debiased(p, y) == pytest.approx(0.25 - bias, abs=1e-12)


def test_debiased_weighs_the_bins():
    p, y = two_class(
        [0.95] * 10 + [0.72] * 30, [True] * 7 + [False] * 3 + [True] * 10 + [False] * 20
    )
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
    y = torch.randint(4, (3000,), generator=generator(4))
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
    gap = ((diagram.accuracy - diagram.confidence).abs() * diagram.counts)[used].sum() / 400
    assert gap.item() == pytest.approx(metrics.ece(p, y, binning="textbook"), abs=1e-12)
    assert (diagram.accuracy * diagram.counts)[used].sum() / 400 == pytest.approx(
        metrics.accuracy(p, y)
    )


# Ranking


def test_aurc_of_a_perfect_order():
    # 6 right first, then 4 wrong: Σ_{k=7}^{10} (k − 6)/k / 10.
    p, y = two_class([0.95 - 0.02 * i for i in range(10)], [True] * 6 + [False] * 4)
    assert metrics.aurc(p, y) == pytest.approx(sum((k - 6) / k for k in range(7, 11)) / 10)
    p, y = two_class([0.95, 0.8], [True, True])
    assert metrics.aurc(p, y) == 0


def test_aurc_of_the_worst_order():
    p, y = two_class([0.95 - 0.02 * i for i in range(10)], [False] * 4 + [True] * 6)
    assert metrics.aurc(p, y) == pytest.approx((4 + sum(4 / k for k in range(5, 11))) / 10)


def test_aurc_of_constant_confidence_is_the_error_rate():
    p, y = two_class([0.7] * 10, [True] * 6 + [False] * 4)
    assert metrics.aurc(p, y) == pytest.approx(0.4)


def test_aurc_of_ties_is_the_mean_over_orders():
    confidences, right = (
        [0.9, 0.8, 0.8, 0.8, 0.8, 0.7, 0.6, 0.6],
        [True, False, True, False, True, True, True, False],
    )
    total, g = 0.0, generator(7)
    for _ in range(1000):
        order = torch.randperm(8, generator=g)
        nudged = [confidences[i] - 1e-9 * rank for rank, i in enumerate(order.tolist())]
        p, y = two_class(nudged, [right[i] for i in order])
        total += metrics.aurc(p, y)
    p, y = two_class(confidences, right)
    assert metrics.aurc(p, y) == pytest.approx(total / 1000, abs=4e-3)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_row_order_changes_nothing(function):
    p, y = calibrated(200)
    p = (p * 8).round() / 8  # many ties
    p[:, 0] += 1 - p.sum(1)
    keep = (p >= 0).all(1)
    p, y = p[keep], y[keep]
    order = torch.randperm(len(y), generator=generator())
    assert function(p[order], y[order]) == pytest.approx(function(p, y), abs=1e-12)


# Intervals


def test_summarise_gives_the_values():
    p, y = calibrated(100)
    summary = metrics.summarise(p, y, resamples=50)
    assert list(summary) == KEYS
    assert [summary[key].value for key in KEYS] == pytest.approx(
        [f(p, y) for f in FUNCTIONS], abs=1e-12
    )
    assert {i.n for i in summary.values()} == {100}
    assert all(i.low < i.high for i in summary.values())


def test_summarise_passes_the_binning():
    p, y = two_class([1.0, 0.95] * 10, [False, True] * 10)
    assert metrics.summarise(p, y, resamples=10)["ece"].value == pytest.approx(0.525)
    assert metrics.summarise(p, y, resamples=10, binning="textbook")["ece"].value == pytest.approx(
        0.475
    )
    assert metrics.summarise(p, y, resamples=10, bins=1000)["ece"].value == pytest.approx(0.525)


def test_intervals_of_means_are_the_normal_ones():
    p, y = calibrated(1000, seed=5)
    summary = metrics.summarise(p, y, resamples=4000)
    log_loss = -p[torch.arange(1000), y].log()
    rate = summary["accuracy"].value
    for key, std in (("accuracy", math.sqrt(rate * (1 - rate))), ("nll", log_loss.std().item())):
        got, half = summary[key], 1.96 * std / math.sqrt(1000)
        assert got.low == pytest.approx(got.value - half, abs=0.1 * half)
        assert got.high == pytest.approx(got.value + half, abs=0.1 * half)


def test_level_narrows_the_interval():
    p, y = calibrated(1000, seed=5)
    wide, narrow = (
        metrics.summarise(p, y, resamples=4000, level=level)["nll"] for level in (0.95, 0.6827)
    )
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(1.96, rel=0.08)


@pytest.mark.parametrize("key", KEYS)
def test_a_resample_is_the_metric_on_the_drawn_rows(key):
    p, y = calibrated(60)
    p[:30] = p[:1]  # ties
    rows = metrics._rows(p, y)
    drawn = torch.randint(60, (60,), generator=generator(1))
    weights = torch.bincount(drawn, minlength=60).double()[None]
    direct = getattr(metrics, key)(p[drawn], y[drawn])
    assert metrics._METRICS[key](rows, weights).item() == pytest.approx(direct, abs=1e-12)


def test_seed_and_blocks(monkeypatch):
    p, y = calibrated(100)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = metrics.summarise(p, y, resamples=100)
    assert torch.equal(before, torch.get_rng_state())
    assert first == metrics.summarise(p, y, resamples=100)
    assert first != metrics.summarise(p, y, resamples=100, seed=1)
    monkeypatch.setattr(metrics, "_CHUNK", 700)
    blocked = metrics.summarise(p, y, resamples=100)
    for key in KEYS:
        assert astuple(blocked[key]) == pytest.approx(astuple(first[key]), abs=1e-12)


@pytest.mark.parametrize("key", KEYS)
def test_paired_sign_and_symmetry(key):
    p, y = calibrated(200)
    q = (p.log() * 3).softmax(1).flip(0)
    one, two = metrics.paired_bootstrap(p, q, y, key), metrics.paired_bootstrap(q, p, y, key)
    assert one.difference == pytest.approx(
        getattr(metrics, key)(p, y) - getattr(metrics, key)(q, y), abs=1e-12
    )
    assert (one.difference > 0) == (key == "accuracy")
    assert (two.difference, two.low, two.high) == pytest.approx(
        (-one.difference, -one.high, -one.low), abs=1e-12
    )
    assert one.p_value == two.p_value
    assert one.low < one.difference < one.high


def test_paired_p_values():
    p, y = calibrated(300)
    worse = (p + 1) / 5
    better = metrics.paired_bootstrap(p, worse, y, resamples=999)
    assert better.p_value == pytest.approx(1 / 1000)
    assert better.high < 0
    same = metrics.paired_bootstrap(p, p.clone(), y, resamples=999)
    assert (same.difference, same.p_value, same.n) == (0, 1, 300)
    noise = torch.randn(300, 4, generator=generator(2), dtype=torch.float64)
    one, two = ((p.log() + sign * 0.2 * noise).softmax(1) for sign in (1, -1))
    assert metrics.paired_bootstrap(one, two, y, resamples=999).p_value > 0.05


def test_paired_p_value_is_the_normal_one():
    p, y = calibrated(1000, seed=1)
    q = (p.log() * 1.25).softmax(1)
    loss = (q[torch.arange(1000), y].log() - p[torch.arange(1000), y].log()).double()
    z = (loss.mean() / loss.std() * math.sqrt(1000)).abs().item()
    expected = math.erfc(z / math.sqrt(2))
    got = metrics.paired_bootstrap(p, q, y, resamples=4000)
    assert 0.001 < expected < 0.5
    assert got.p_value == pytest.approx(
        expected, abs=4 * math.sqrt(expected / 4000) + 0.1 * expected
    )


def test_pairing_narrows_the_interval():
    p, y = calibrated(300)
    q = (p.log() * 1.1).softmax(1)
    paired, alone = metrics.paired_bootstrap(p, q, y), metrics.summarise(p, y)["nll"]
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)


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
        (GOOD * 1.0011, LABELS, "off 1 by 0.0011.*apply softmax"),
        (torch.tensor([[1.5, -0.5], [0.2, 0.8]]), LABELS, "least entry is -0.5"),
        (torch.tensor([[math.nan, 0.5], [0.2, 0.8]]), LABELS, "expected finite entries"),
        (torch.tensor([[math.inf, 0.5], [0.2, 0.8]]), LABELS, "expected finite entries"),
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


@pytest.mark.parametrize(
    ("function", "options", "match"),
    [
        (metrics.ece, {"bins": 0}, "got bins=0; expected 1 or more"),
        (
            metrics.ece_debiased,
            {"binning": "equal"},
            "got binning 'equal'; expected one of .*textbook",
        ),
        (metrics.reliability, {"bins": -1}, "got bins=-1"),
        (metrics.summarise, {"resamples": 0}, "got resamples=0; expected 1 or more"),
        (metrics.summarise, {"level": 1.0}, "got level=1.0; expected a number between 0 and 1"),
        (metrics.summarise, {"level": 95}, "got level=95"),
    ],
)
def test_bad_options_are_refused(function, options, match):
    with pytest.raises(ValueError, match=match):
        function(GOOD, LABELS, **options)


def test_unknown_metric_is_refused():
    with pytest.raises(ValueError, match=r"got metric 'loss'; expected one of \('accuracy', 'nll'"):
        metrics.paired_bootstrap(GOOD, GOOD, LABELS, metric="loss")


def test_import_is_light():
    heavy = "import sys, bayestune.metrics; sys.exit(bool({'transformers', 'peft', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", heavy], check=False).returncode == 0


def test_runs_are_averaged_and_share_the_resampled_rows():
    torch.manual_seed(0)
    first, second = torch.rand(2, 3, 40, 4, dtype=torch.float64).softmax(-1)
    labels = torch.randint(4, (40,))
    found = metrics.paired_bootstrap(first, second, labels, "nll", 200)
    rows = [-p.gather(-1, labels.expand(3, -1)[..., None])[..., 0].log() for p in (first, second)]
    each = (rows[0] - rows[1]).mean(0)  # one number a question
    assert found.difference == pytest.approx(each.mean().item())
    generator = torch.Generator().manual_seed(0)
    drawn = each[torch.randint(40, (200, 40), generator=generator)].mean(1)
    d = each.mean()
    assert found.p_value == pytest.approx((1 + ((drawn - d).abs() >= d.abs()).sum().item()) / 201)
    assert metrics.paired_bootstrap(first[:1], second[:1], labels) == metrics.paired_bootstrap(
        first[0], second[0], labels
    )
    with pytest.raises(
        ValueError, match="got 3 and 2 runs; expected as many of both; compare the runs"
    ):
        metrics.paired_bootstrap(first, second[:2], labels)
