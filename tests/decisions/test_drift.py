"""Drift and which rows to label: exact cases, false alarms, power, brute force."""

import itertools
import math

import pytest
import torch
from scipy import stats
from torch.special import entr

from bayestune.decisions import (
    Spread,
    as_kept,
    drift_test,
    false_alarm_rate,
    permutations_for,
    rank_rows,
)


def normal(count, seed, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=g, dtype=torch.float64) + shift


def test_distances_and_p_values_are_those_of_scipy():
    old, new = normal(80, 0), normal(60, 1, 0.3)
    exact = stats.ks_2samp(old.numpy(), new.numpy())
    got = drift_test({"s": old}, {"s": new}, 4999)
    assert got.statistics["s"] == pytest.approx(exact.statistic)
    error = 4 * math.sqrt(exact.pvalue * (1 - exact.pvalue) / 4999)
    assert got.p_value == pytest.approx(exact.pvalue, abs=error + 1e-3)


def test_ties_are_taken_together():
    old = torch.tensor([0.0] * 10 + [1.0] * 10)
    assert drift_test({"s": old}, {"s": old.flip(0)}, 99).p_value == 1


def test_false_alarms_and_power():
    runs = 300
    alarms = 0
    for seed in range(runs):
        old = {"a": normal(60, 3 * seed), "b": normal(60, 3 * seed + 1).round()}
        new = {name: values[40:] for name, values in old.items()}
        old = {name: values[:40] for name, values in old.items()}
        alarms += drift_test(old, new, 99, seed).p_value <= 0.1
    assert alarms / runs <= 0.1 + 3 * math.sqrt(0.09 / runs)
    assert alarms > 0
    assert drift_test({"a": normal(60, 0)}, {"a": normal(60, 1, 1.0)}).p_value < 0.01


def test_the_simulated_rate_of_false_alarms():
    rate = false_alarm_rate({"a": normal(100, 0)}, 40, 0.1, 150)
    assert rate <= 0.1 + 3 * math.sqrt(0.09 / 150)
    with pytest.raises(ValueError, match="got num_new=100 of 100 rows; expected 1 to 99"):
        false_alarm_rate({"a": normal(100, 0)}, 100)


def test_a_test_at_any_level_can_alarm():
    """R permutations never give less than m/(1 + R) for m scores."""
    old = {name: normal(60, seed) for seed, name in enumerate("abcde")}
    new = {name: values[:30] + 5 for name, values in old.items()}
    for level in (0.05, 0.004, 0.0005):
        assert drift_test(old, new, permutations_for(level, 5)).p_value <= level
    assert drift_test(old, new).p_value > 0.004
    assert permutations_for(0.05, 5) == 999
    with pytest.raises(ValueError, match="got level=1e-06; expected 0.0001 or more for 5 scores"):
        permutations_for(1e-6, 5)


def test_the_simulated_rate_is_that_of_the_test():
    """As many of random splits are called different as `drift_test` calls so."""
    old = {"a": normal(50, 0).round(), "b": normal(50, 1)}
    generator = torch.Generator().manual_seed(0)
    alarms = 0
    for seed in range(300):
        order = torch.randperm(50, generator=generator)
        parts = [{name: s[own] for name, s in old.items()} for own in order.split([30, 20])]
        alarms += drift_test(*parts, 199, seed).p_value <= 0.2
    rate = false_alarm_rate(old, 20, 0.2, 2000)
    assert 0 < rate <= 0.2 + 3 * math.sqrt(0.16 / 2000)
    assert alarms / 300 == pytest.approx(rate, abs=3 * math.sqrt(0.16 / 300))
    assert false_alarm_rate({"a": normal(300, 0)}, 100, 0.01, 2000) > 0


def test_scores_below_the_digits_that_are_kept_are_no_drift():
    """A sure model's scores are 1e-10: kept as 0, they lie below every new one."""
    tiny = {"a": 1e-10 * normal(200, 0).exp()}
    kept = {name: torch.tensor(values) for name, values in as_kept(tiny).items()}
    assert drift_test(kept, tiny).p_value < 0.01
    again = {name: torch.tensor(values) for name, values in as_kept(tiny).items()}
    assert drift_test(kept, again).p_value == 1


def test_holm_over_the_scores():
    old = {name: normal(50, seed) for seed, name in enumerate("abc")}
    new = {name: values + 9 * (name == "a") for name, values in old.items()}
    got = drift_test(old, new, 999)
    assert got.p_values["a"] == pytest.approx(3 / 1000)
    assert got.p_value == got.p_values["a"]
    assert (got.p_values["b"], got.p_values["c"]) == (1, 1)


def test_rows_that_stick_out():
    old = {"s": normal(500, 0)}
    new = torch.cat([normal(50, 1), torch.tensor([9.0, 8.0])])
    got = drift_test(old, {"s": new}, 19)
    assert set(got.odd) == {50, 51}
    assert got.row_p_values[50] == pytest.approx(1 / 501)
    below = (1 + (old["s"] >= new[0]).sum()) / 501
    assert got.row_p_values[0] == pytest.approx(below.item())
    assert drift_test(old, {"s": old["s"][:50]}, 19).odd == []


def test_drift_refusals():
    a = {"a": normal(20, 0)}
    for old, new, match in [
        (a, {"b": a["a"]}, "expected the same names of both"),
        ({}, {}, "expected the same names"),
        (a, {"a": torch.zeros(0)}, r"got scores of shapes \[\(0,\)\]"),
        (a, {"a": torch.full((3,), torch.nan)}, "got scores with NaN"),
    ]:
        with pytest.raises(ValueError, match=match):
            drift_test(old, new)
    with pytest.raises(ValueError, match="got permutations=5; expected 19 or more"):
        drift_test(a, a, 5)


# Which rows to label


def some_logits(draws=6, rows=30, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(draws, rows, classes, generator=g, dtype=torch.float64)


def joint_information(spread, rows):
    """I(y_1…y_b; A) by going through all joint answers."""
    draws = spread.draws
    joint = 0.0
    for answers in itertools.product(range(draws.shape[-1]), repeat=len(rows)):
        p = torch.ones(len(draws), dtype=torch.float64)
        for row, answer in zip(rows, answers, strict=True):
            p = p * draws[:, row, answer]
        joint += entr(p.mean()).item()
    return joint - entr(draws[:, rows]).sum(-1).mean(0).sum().item()


def test_batch_bald_is_greedy_joint_information():
    logits = some_logits()
    spread = Spread.of(logits)
    taken = rank_rows(logits, 3, "batch_bald").tolist()
    assert taken[0] == spread.mutual_information().argmax()
    for size in (2, 3):
        before = taken[: size - 1]
        gains = {
            row: joint_information(spread, [*before, row]) for row in range(30) if row not in before
        }
        assert taken[size - 1] == max(gains, key=gains.__getitem__)


def test_copies_of_one_row_are_not_taken_twice():
    one = some_logits(rows=1, seed=1) * 3
    others = some_logits(rows=10, seed=2)
    logits = torch.cat([one.repeat(1, 10, 1), others], 1)
    for rule in ("bald", "batch_bald"):
        taken = rank_rows(logits, 3, rule).tolist()
        assert sum(index < 10 for index in taken) <= 1, rule
        assert len(set(taken)) == 3


def test_features_decide_what_is_alike():
    logits = some_logits(rows=10)
    features = torch.zeros(10, 2)
    features[7] = 5.0
    taken = rank_rows(logits, 2, "bald", features).tolist()
    top = Spread.of(logits).mutual_information().argmax().item()
    assert taken == ([7, 0] if top == 7 else [top, 7]) or top == 7
    assert len(set(rank_rows(logits, 10, "bald", features).tolist())) == 10


def test_only_the_top_of_the_information_is_a_candidate():
    logits = some_logits(rows=100)
    order = Spread.of(logits).mutual_information().argsort(descending=True)
    assert set(rank_rows(logits, 4).tolist()) <= set(order[:20].tolist())


def test_plain_rules():
    logits = some_logits()
    spread = Spread.of(logits)
    entropy = rank_rows(logits, 30, "entropy")
    assert (spread.total_entropy()[entropy].diff() <= 0).all()
    margin = rank_rows(logits, 30, "margin")
    assert (spread.negative_margin()[margin].diff() <= 0).all()
    random = [rank_rows(logits, 30, "random", seed=seed).tolist() for seed in (0, 0, 1)]
    assert random[0] == random[1] != random[2]
    assert sorted(random[0]) == list(range(30))


def test_rank_refusals():
    logits = some_logits()
    for call, match in [
        (lambda: rank_rows(logits, 2, "coin"), "got 'coin'; expected one of"),
        (lambda: rank_rows(logits, 31), "got number=31; expected 1 to 30"),
        (lambda: rank_rows(logits[:1], 2), "got one draw for 'bald'; expected two or more"),
        (lambda: rank_rows(logits, 9, "batch_bald"), "expected 6 or fewer with 3 options"),
        (lambda: rank_rows(logits, 2, "bald", torch.zeros(3, 2)), r"expected \(30, k\)"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize("by", ["bald", "batch_bald", "entropy", "margin", "random"])
def test_copies_of_a_row_are_ranked_behind_all_others(by):
    logits = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    copied = torch.cat([logits, logits[:, :1].expand(-1, 20, -1)], 1)  # one row, 21 times
    features = copied.transpose(0, 1).flatten(1)
    same = ["a", "b", "c", *["a"] * 20]
    assert sorted(rank_rows(copied, 3, by, features, same=same).tolist()) == [0, 1, 2]
    assert rank_rows(copied, 5, by, features, same=same).tolist()[3:] == [3, 4]
    assert torch.equal(rank_rows(logits, 3, by), rank_rows(logits, 3, by, same=["a", "b", "c"]))
