"""Intervals: exact on the resamples they draw, normal theory within Monte Carlo error, refusals."""

import math

import pytest
import torch
from scipy.stats import binom, binomtest, bootstrap

from bayestune import metrics
from bayestune.metrics import Bins, calibrated_level, paired_bootstrap, summarise
from bayestune.metrics.proportions import share_interval

KEYS = ["accuracy", "nll", "brier", "ece", "ece_if_calibrated", "aurc"]
PAIRED = ["accuracy", "nll", "brier", "aurc"]


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


def test_the_values_are_those_of_the_metrics_and_lie_inside():
    p, y = calibrated(100)
    summary = summarise(p, y, resamples=50)
    assert list(summary) == KEYS
    for key, interval in summary.items():
        if key != "ece_if_calibrated":
            assert interval.value == pytest.approx(getattr(metrics, key)(p, y), abs=1e-12)
        assert interval.low <= interval.value <= interval.high
        assert interval.low < interval.high
        assert interval.n == 100


def test_the_bins_are_passed_on():
    p = torch.tensor([[1.0, 0.0], [0.95, 0.05]] * 10)
    y = torch.tensor([1, 0] * 10)
    for bins in (Bins(), Bins(binning="textbook"), Bins(1000)):
        summary = summarise(p, y, bins, 10)
        assert summary["ece"].value == metrics.ece(p, y, bins)
        assert summary["ece_if_calibrated"] == calibrated_level(p, y, bins)


# Accuracy


@pytest.mark.parametrize("n", [1, 20, 333])
def test_the_interval_of_a_share_is_where_the_mid_p_values_reach_the_tails(n):
    for k in {0, 1, n // 3, n - 1, n}:
        low, high = share_interval(k, n, 0.95)
        half = {share: binom.pmf(k, n, share) / 2 for share in (low, high)}
        if k:
            assert binom.sf(k, n, low) + half[low] == pytest.approx(0.025, rel=1e-6)
        if k < n:
            assert binom.cdf(k - 1, n, high) + half[high] == pytest.approx(0.025, rel=1e-6)
        exact = binomtest(k, n).proportion_ci(0.95, "exact")
        assert exact.low <= low <= k / n <= high <= exact.high


def test_all_right_does_not_prove_that_all_will_be():
    p = torch.tensor([[0.9, 0.1]]).repeat(50, 1)
    found = summarise(p, torch.zeros(50, dtype=torch.long))["accuracy"]
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(0.05 ** (1 / 50))


# NLL, Brier score, AURC


def test_the_ends_of_a_mean_are_bootstrap_t_over_all_blocks():
    p, y = calibrated(3000)  # 1000 resamples of so many rows are two blocks
    torch.manual_seed(0)
    before = torch.get_rng_state()
    interval = summarise(p, y)["nll"]
    assert torch.equal(before, torch.get_rng_state())
    losses = log_loss(p, y)
    drawn = losses[drawn_rows(1000, 3000)]
    studentised = (drawn.mean(1) - losses.mean()) / drawn.std(1, correction=0)
    tails = studentised.quantile(torch.tensor([0.975, 0.025], dtype=torch.float64))
    ends = losses.mean() - losses.std(correction=0) * tails
    assert [interval.low, interval.high] == pytest.approx(ends.tolist(), abs=1e-12)


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


def test_the_interval_of_aurc_is_scipys_bca():
    p, y = calibrated(80)
    rows = torch.arange(80)

    def statistic(numbers):
        return metrics.aurc(p[numbers.astype(int)], y[numbers.astype(int)])

    expected = bootstrap(
        (rows.numpy(),), statistic, n_resamples=2000, vectorized=False, method="BCa", rng=0
    ).confidence_interval
    found = summarise(p, y, resamples=2000)["aurc"]
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.06 * width)
    assert found.high == pytest.approx(expected.high, abs=0.06 * width)


def test_what_rows_cannot_tell_has_no_interval():
    p, _ = calibrated(40)
    sure = p.argmax(1)
    found = summarise(p, sure)
    assert (found["aurc"].value, found["aurc"].low, found["aurc"].high) == (0, None, None)
    constant = summarise(p[:1].repeat(20, 1), sure[:1].repeat(20))
    assert constant["nll"].low is None
    one_wrong = sure.clone()
    one_wrong[0] = p[0].argmin()
    saturated = torch.nn.functional.one_hot(sure, 4).double()
    brier = summarise(saturated, one_wrong)["brier"]
    assert (brier.value, brier.low) == (2 / 40, 0)
    assert 0.1 < brier.high < 0.5


def test_known_losses_take_the_place_of_the_probabilities():
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8]])
    y = torch.tensor([1, 0, 1])
    losses = torch.tensor([900.0, math.log(2), -math.log(0.8)])
    found = summarise(p, y, resamples=10, losses=losses)
    assert found["nll"].value == pytest.approx(losses.double().mean().item())
    with pytest.raises(ValueError, match=r"got losses of shape \(2,\) for 3 rows; expected \(N,\)"):
        summarise(p, y, losses=losses[:2])


# ECE


def test_the_level_of_a_calibrated_model_is_that_of_redrawn_labels():
    p, y = calibrated(150)
    found = calibrated_level(p, y)
    g = torch.Generator().manual_seed(7)
    redrawn = [metrics.ece(p, torch.multinomial(p, 1, generator=g)[:, 0]) for _ in range(1000)]
    values = torch.tensor(redrawn, dtype=torch.float64)
    error = values.std().item() / math.sqrt(500)
    assert found.value == pytest.approx(values.mean().item(), abs=4 * error)
    share = (values >= metrics.ece(p, y)).double().mean().item()
    assert found.p_value == pytest.approx(share, abs=4 * math.sqrt(0.5 / 1000))
    ends = values.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    assert [found.low, found.high] == pytest.approx(ends, abs=8 * error)


def test_overconfidence_is_told_from_calibration():
    p, y = calibrated(400)
    sharp = (p.log() * 3).softmax(1)
    found = summarise(sharp, y)
    assert found["ece_if_calibrated"].p_value == pytest.approx(1 / 1001)
    assert found["ece"].low > 0.1
    assert found["ece_if_calibrated"].high < found["ece"].low
    honest = summarise(p, y)
    assert honest["ece"].low == 0
    assert honest["ece_if_calibrated"].p_value > 0.05


def test_large_sets_are_redrawn_in_blocks():
    p, y = calibrated(9000)  # 232 sets of labels a block
    found = summarise(p, y, resamples=10)["ece_if_calibrated"]
    assert found.value == pytest.approx(0.8 * math.sqrt(0.2 * 11 / 9000), rel=0.2)


# Paired differences


@pytest.mark.parametrize("key", PAIRED)
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


def test_a_difference_of_accuracies_is_bonetts_and_prices():
    p, y = calibrated(60)
    q = p.roll(1, 1)
    right = [(x.argmax(1) == y).long() for x in (p, q)]
    only_first, only_second = (int(((a - b) > 0).sum()) for a, b in (right, right[::-1]))
    first, second = (only_first + 1) / 62, (only_second + 1) / 62
    half = 1.959964 * math.sqrt((first + second - (first - second) ** 2) / 62)
    found = paired_bootstrap(p, q, y, "accuracy")
    assert [found.low, found.high] == pytest.approx(
        [first - second - half, first - second + half], abs=1e-6
    )
    same = paired_bootstrap(p, p, y, "accuracy")
    assert same.low < 0 < same.high  # agreement on 60 rows is not agreement on all


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
    with pytest.raises(ValueError, match="got metric 'ece'; .* no interval of its differences"):
        paired_bootstrap(p, p, y, metric="ece")
    with pytest.raises(ValueError, match="got resamples=0; expected 1 or more"):
        summarise(p, y, resamples=0)
