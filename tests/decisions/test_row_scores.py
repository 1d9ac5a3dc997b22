"""Scores and distances: closed forms by hand and by scipy, laws, refusals."""

import json
import math

import pytest
import torch

from bayestune.decisions import (
    ROW_SCORES,
    Distance,
    Spread,
    best_temperature,
    log_predictive,
    predictive_nll,
    score_rows,
    shrunk_covariance,
    spread_out,
)
from bayestune.decisions.tempering import LOG_GRID, nll_by_temperature

H = torch.distributions.Categorical


def some_logits(draws=5, rows=20, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(draws, rows, classes, generator=g, dtype=torch.float64)


def test_by_hand():
    p = torch.tensor([[[0.8, 0.15, 0.05]], [[0.4, 0.35, 0.25]]], dtype=torch.float64)
    mean = torch.tensor([0.6, 0.25, 0.15], dtype=torch.float64)
    got = {name: value.item() for name, value in score_rows(p.log()).items()}
    total = H(mean).entropy().item()
    expected = H(p[:, 0]).entropy().mean().item()
    low = torch.tensor([0.4, 0.15, 0.05], dtype=torch.float64)
    span = torch.tensor([0.4, 0.2, 0.2], dtype=torch.float64)
    intersection = low + (1 - 0.6) / 0.8 * span
    assert got == pytest.approx(
        {
            "one_minus_confidence": 0.4,
            "negative_margin": 0.25 - 0.6,
            "total_entropy": total,
            "expected_entropy": expected,
            "corrected_mutual_information": 2 * (total - expected),
            "variation": 0.08,  # of 0.8 and 0.4, by S − 1
            "credal_entropy": H(intersection).entropy().item(),
            "credal_width": 0.8,
        }
    )


def test_a_single_draw_has_no_spread_and_its_intersection_is_itself():
    logits = some_logits(draws=1)
    got = score_rows(logits)
    for name in ("corrected_mutual_information", "variation", "credal_width"):
        assert got[name].abs().max() < 1e-12
    torch.testing.assert_close(got["credal_entropy"], got["total_entropy"])
    same = score_rows(logits.repeat(4, 1, 1))
    torch.testing.assert_close(same["credal_entropy"], got["total_entropy"])


def test_the_intersection_lies_in_the_intervals_and_sums_to_one():
    spread = Spread.of(some_logits(rows=200))
    found = spread.intersection()
    torch.testing.assert_close(found.sum(-1), torch.ones(200, dtype=torch.float64))
    assert (found >= spread.draws.amin(0) - 1e-12).all()
    assert (found <= spread.draws.amax(0) + 1e-12).all()


def test_the_corrected_information_does_not_depend_on_the_number_of_draws():
    logits = some_logits(draws=4000, rows=30)
    limit = Spread.of(logits).mutual_information().mean()
    ratio = []
    plain = []
    for count in (2, 5):
        chunks = logits.split(count)
        corrected = [score_rows(c, ("corrected_mutual_information",)) for c in chunks]
        values = torch.stack([c["corrected_mutual_information"] for c in corrected])
        ratio.append((values.mean() / limit).item())
        plain.append(ratio[-1] * (count - 1) / count)
    assert ratio == pytest.approx([1, 1], abs=0.1)
    assert plain[0] < 0.6  # what ranking by the plain one would do


def test_the_order_of_the_draws_and_the_options_a_row_lacks_change_nothing():
    logits = some_logits()
    padded = torch.cat([logits, torch.full((5, 20, 2), -torch.inf)], -1)
    for name, value in score_rows(logits).items():
        torch.testing.assert_close(score_rows(logits.flip(0))[name], value)
        torch.testing.assert_close(score_rows(padded)[name], value)


def test_the_temperature_divides_the_logits():
    logits = some_logits()
    hot = score_rows(logits, temperature=3.0)
    for name, value in score_rows(logits / 3).items():
        torch.testing.assert_close(hot[name], value)


@pytest.mark.parametrize(
    ("logits", "names", "match"),
    [
        (torch.zeros(2, 3), ROW_SCORES, r"got logits of shape \(2, 3\); expected \(S, N, C\)"),
        (torch.full((1, 2, 2), torch.nan), ROW_SCORES, "got logits with NaN or rows of no option"),
        (torch.tensor([[[torch.inf, 0.0]]]), ROW_SCORES, "got infinite logits; expected numbers"),
        (torch.full((1, 2, 2), -torch.inf), ROW_SCORES, "rows of no option; expected numbers"),
        (torch.zeros(1, 2, 2), ("doubt",), "got score 'doubt'; expected one of"),
        (torch.zeros(1, 2, 1), ROW_SCORES, "got rows of one option; expected two or more"),
    ],
)
def test_score_refusals(logits, names, match):
    with pytest.raises(ValueError, match=match):
        score_rows(logits, names)


# Temperature


def test_the_grid_and_the_optimiser_agree():
    g = torch.Generator().manual_seed(1)
    truth = torch.randn(400, 4, generator=g, dtype=torch.float64) * 2
    labels = torch.multinomial(truth.softmax(-1), 1, generator=g)[:, 0]
    logits = 3 * truth + torch.randn(3, 400, 4, generator=g)
    table = nll_by_temperature(logits, labels)
    on_grid = LOG_GRID[table.mean(1).argmin()].exp().item()
    found = best_temperature(logits, labels)
    assert found == pytest.approx(on_grid, rel=math.exp(1 / 8) - 1)
    row = int((LOG_GRID - math.log(on_grid)).abs().argmin())
    own = -log_predictive(logits, on_grid).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(table[row], own)
    assert own.mean().item() == pytest.approx(predictive_nll(logits / on_grid, labels).item())


# Distance


def test_the_shrunk_covariance_is_ledoit_and_wolf():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=g, dtype=torch.float64) * torch.tensor([3.0, 1, 1, 0.2])
    x = x - x.mean(0)
    plain = x.T @ x / 30
    target = plain.trace() / 4 * torch.eye(4, dtype=torch.float64)
    noise = sum((row[:, None] * row - plain).square().sum() for row in x) / 30**2
    share = (noise / (plain - target).square().sum()).clamp_max(1)
    assert 0.01 < share < 1
    torch.testing.assert_close(shrunk_covariance(x), (1 - share) * plain + share * target)


def drawn_activations(rows, ranks=(3, 2), seed=0):
    g = torch.Generator().manual_seed(seed)
    found = {}
    for place, rank in enumerate(ranks):
        mix = torch.eye(rank) + 0.3 * torch.randn(rank, rank, generator=g)
        found[f"slot{place}"] = (
            torch.randn(rows, rank, generator=g, dtype=torch.float64) @ mix.double()
        )
    return found


def test_distances_are_chi_squared_on_their_own_rows_and_add_over_slots():
    h = drawn_activations(4000)
    both = Distance.fit(h).of(h)
    assert both.mean().item() == pytest.approx(5, rel=0.02)
    assert both.var().item() == pytest.approx(10, rel=0.1)
    parts = [Distance.fit({name: own}).of({name: own}) for name, own in h.items()]
    torch.testing.assert_close(both, parts[0] + parts[1])
    far = {name: own + 10 for name, own in h.items()}
    assert (Distance.fit(h).of(far) > both).all()


def test_a_distance_is_mahalanobis_and_that_between_whitened_points():
    h = drawn_activations(30, ranks=(4,))
    fitted = Distance.fit(h)
    values = h["slot0"]
    centred = values - values.mean(0)
    precision = torch.linalg.inv(shrunk_covariance(centred))
    torch.testing.assert_close(
        fitted.of(h), (centred @ precision * centred).sum(-1), rtol=1e-4, atol=1e-5
    )
    points = spread_out(h)
    assert points is not None
    difference = values[0] - values[1]
    between = (points[0] - points[1]).square().sum().item()
    assert between == pytest.approx((difference @ precision @ difference).item(), rel=1e-4)


def test_a_slot_that_sees_the_same_in_every_row_says_nothing():
    h = drawn_activations(50)
    same = 3 + 1e-5 * torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    fitted = Distance.fit({**h, "first": same})
    assert list(fitted.means) == ["slot0", "slot1"]
    torch.testing.assert_close(fitted.of({**h, "first": -same}), Distance.fit(h).of(h))
    assert spread_out({"first": same}) is None


def test_a_distance_is_kept_as_text_bit_for_bit():
    h = drawn_activations(50)
    fitted = Distance.fit(h)
    again = Distance.from_json(json.loads(json.dumps(fitted.to_json())))
    assert torch.equal(again.of(h), fitted.of(h))


def test_fewer_rows_than_features_still_have_a_distance():
    h = {"slot": torch.randn(5, 20, generator=torch.Generator().manual_seed(0))}
    assert Distance.fit(h).of(h).isfinite().all()


def test_distance_refusals():
    h = drawn_activations(5)
    with pytest.raises(ValueError, match=r"got activations of slot of shape \(5, 3, 1\); expected"):
        Distance.fit({"slot": h["slot0"][..., None]})
    with pytest.raises(ValueError, match=r"got activations of \[4, 5\] rows; expected as many"):
        Distance.fit({**h, "other": h["slot0"][1:]})
    with pytest.raises(ValueError, match="got activations of one row; expected two or more"):
        Distance.fit({"slot": h["slot0"][:1]})
    with pytest.raises(ValueError, match="got 1 slots whose activations are all the same"):
        Distance.fit({"slot": torch.ones(5, 3)})
    with pytest.raises(ValueError, match=r"got no activations of slot1; expected \(N, 2\)"):
        Distance.fit(h).of({"slot0": h["slot0"]})
    with pytest.raises(ValueError, match=r"of shape \(5, 2\) of slot0; expected \(N, 3\)"):
        Distance.fit(h).of({"slot0": h["slot1"], "slot1": h["slot1"]})


@pytest.mark.parametrize("times", [1, 7])
def test_rows_of_two_kinds_are_enough_for_points_and_distances(times):
    two = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, 4.0]]).repeat(times, 1)
    points = spread_out({"layer": two})
    assert points.isfinite().all()
    assert (points[0] - points[1]).norm() > 1
    assert Distance.fit({"layer": two}).of({"layer": two}).isfinite().all()
