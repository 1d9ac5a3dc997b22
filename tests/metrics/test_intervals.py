"""Bootstrap: exact on the resamples it draws, and normal theory within Monte Carlo error."""

import math

import pytest
import torch

from bayestune import metrics
from bayestune.metrics import Bins, paired_bootstrap, summarise

KEYS = ["accuracy", "nll", "brier", "ece", "ece_debiased", "aurc"]


def calibrated(n, seed=0):
    """Probabilities of four classes, and labels drawn from them."""
    g = torch.Generator().manual_seed(seed)
    p = (torch.randn(n, 4, generator=g, dtype=torch.float64) * 1.5).softmax(1)
    return p, torch.multinomial(p, 1, generator=g)[:, 0]


def drawn_rows(resamples, n):
    """The rows of each resample, (R, N)."""
    return torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(0))


def log_loss(p, y):
    return -p.gather(-1, y.expand(p.shape[:-1])[..., None])[..., 0].log()


def test_the_values_are_those_of_the_metrics():
    p, y = calibrated(100)
    summary = summarise(p, y, resamples=50)
    assert list(summary) == KEYS
    for key, interval in summary.items():
        assert interval.value == pytest.approx(getattr(metrics, key)(p, y), abs=1e-12)
        assert interval.low < interval.high
        assert interval.n == 100


def test_the_bins_are_passed_on():
    p = torch.tensor([[1.0, 0.0], [0.95, 0.05]] * 10)
    y = torch.tensor([1, 0] * 10)
    for bins in (Bins(), Bins(binning="textbook"), Bins(1000)):
        assert summarise(p, y, bins, 10)["ece"].value == metrics.ece(p, y, bins)
        paired = paired_bootstrap(p, p.flip(0), y, "ece", 10, bins)
        assert paired.difference == metrics.ece(p, y, bins) - metrics.ece(p.flip(0), y, bins)


@pytest.mark.parametrize("key", KEYS)
def test_a_resample_is_the_metric_on_the_drawn_rows(key):
    p, y = calibrated(60)
    p[:30] = p[:1]  # ties
    drawn = drawn_rows(1, 60)[0]
    interval = summarise(p, y, resamples=1)[key]
    assert interval.low == interval.high
    direct = getattr(metrics, key)(p[drawn], y[drawn])
    assert interval.low == pytest.approx(direct, abs=1e-12)


def test_ends_are_percentiles_over_all_blocks_and_the_global_generator_is_left_alone():
    p, y = calibrated(3000)  # 1000 resamples of so many rows are two blocks
    torch.manual_seed(0)
    before = torch.get_rng_state()
    interval = summarise(p, y)["nll"]
    assert torch.equal(before, torch.get_rng_state())
    values = log_loss(p, y)[drawn_rows(1000, 3000)].mean(1)
    ends = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert [interval.low, interval.high] == pytest.approx(ends, abs=1e-12)


def test_intervals_of_means_are_the_normal_ones():
    p, y = calibrated(1000, seed=5)
    summary = summarise(p, y, resamples=4000)
    rate = summary["accuracy"].value
    stds = {"accuracy": math.sqrt(rate * (1 - rate)), "nll": log_loss(p, y).std().item()}
    for key, std in stds.items():
        got = summary[key]
        half = 1.96 * std / math.sqrt(1000)
        assert got.low == pytest.approx(got.value - half, abs=0.1 * half)
        assert got.high == pytest.approx(got.value + half, abs=0.1 * half)


@pytest.mark.parametrize("key", KEYS)
def test_paired_sign_and_symmetry(key):
    p, y = calibrated(200)
    q = (p.log() * 3).softmax(1).flip(0)
    one = paired_bootstrap(p, q, y, key)
    two = paired_bootstrap(q, p, y, key)
    metric = getattr(metrics, key)
    assert one.difference == pytest.approx(metric(p, y) - metric(q, y), abs=1e-12)
    assert (one.difference > 0) == (key == "accuracy")
    turned = (-one.difference, -one.high, -one.low)
    assert (two.difference, two.low, two.high) == pytest.approx(turned, abs=1e-12)
    assert one.p_value == two.p_value
    assert one.low < one.difference < one.high


def test_p_values_of_a_sure_and_of_no_difference():
    p, y = calibrated(300)
    better = paired_bootstrap(p, (p + 1) / 5, y, resamples=999)
    assert better.p_value == pytest.approx(1 / 1000)
    assert better.high < 0
    same = paired_bootstrap(p, p.clone(), y, resamples=999)
    assert (same.difference, same.p_value, same.n) == (0, 1, 300)


def test_the_p_value_is_the_normal_one():
    p, y = calibrated(1000, seed=1)
    q = (p.log() * 1.25).softmax(1)
    loss = log_loss(p, y) - log_loss(q, y)
    z = (loss.mean() / loss.std() * math.sqrt(1000)).abs().item()
    expected = math.erfc(z / math.sqrt(2))
    assert 0.001 < expected < 0.5
    got = paired_bootstrap(p, q, y, resamples=4000).p_value
    assert got == pytest.approx(expected, abs=4 * math.sqrt(expected / 4000) + 0.1 * expected)


def test_pairing_narrows_the_interval():
    p, y = calibrated(300)
    paired = paired_bootstrap(p, (p.log() * 1.1).softmax(1), y)
    alone = summarise(p, y)["nll"]
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)


def test_runs_are_averaged_and_share_the_resampled_rows():
    g = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 3, 40, 4, generator=g, dtype=torch.float64).softmax(-1)
    labels = torch.randint(4, (40,), generator=g)
    found = paired_bootstrap(first, second, labels, "nll", 200)
    each = (log_loss(first, labels) - log_loss(second, labels)).mean(0)  # one number a question
    assert found.difference == pytest.approx(each.mean().item())
    far = (each[drawn_rows(200, 40)].mean(1) - each.mean()).abs() >= each.mean().abs()
    assert found.p_value == pytest.approx((1 + far.sum().item()) / 201)
    alone = paired_bootstrap(first[0], second[0], labels)
    assert paired_bootstrap(first[:1], second[:1], labels) == alone
    with pytest.raises(ValueError, match="got 3 and 2 runs; expected as many of both; compare"):
        paired_bootstrap(first, second[:2], labels)


def test_refusals():
    p, y = calibrated(2)
    with pytest.raises(ValueError, match=r"got metric 'loss'; expected one of \('accuracy', 'nll'"):
        paired_bootstrap(p, p, y, metric="loss")
    with pytest.raises(ValueError, match="got resamples=0; expected 1 or more"):
        summarise(p, y, resamples=0)
