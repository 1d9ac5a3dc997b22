"""Adaptive draws on logits that are known functions of row and draw, and on a tiny model."""

import math

import pytest
import torch
from stand_ins import ROWS, Atoms, random_gaussian
from torch.testing import assert_close

from bayestune import Adaptive, predict_adaptively
from bayestune.adapters import Lora, attach
from bayestune.evaluation.adaptive import AdaptivePrediction, in_rounds
from bayestune.forward import Draws
from bayestune.posteriors import Point, Prediction, predict
from bayestune.scoring import make_scorer, row_logits

SURE = [30.0, -30.0]  # probabilities of 1 and 0, exactly 1 in float64
OTHER = [-30.0, 30.0]
MEASURES = ("probabilities", "total_entropy", "expected_entropy", "mutual_information")


class Saved:
    """Logits (S, N, C) as a source, which notes what it is asked for."""

    def __init__(self, logits):
        self.logits = logits
        self.asked = []

    def __call__(self, rows, draws):
        self.asked.append((list(rows), draws))
        return self.logits[draws.start : draws.stop, rows]

    def under(self, rule):
        return in_rounds(self, self.logits.shape[1], rule)


def random_logits(*shape, scale=1.0, seed=0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def table(*rows):
    """Rows of draws to (S, N, C)."""
    return torch.tensor(rows).transpose(0, 1)


def assert_same(one, other, **how):
    for name in MEASURES:
        assert_close(getattr(one, name), getattr(other, name), **how)


# The rounds


@pytest.mark.parametrize(
    ("rule", "ends"),
    [
        (Adaptive(), [6, 8, 10]),
        (Adaptive(most=9, round_size=3), [5, 8, 9]),
        (Adaptive(most=2), [2]),
        (Adaptive(most=1), [1]),
    ],
)
def test_rounds_go_on_where_the_last_ended(rule, ends):
    rounds = list(rule.rounds())
    assert [part.stop for part in rounds] == ends
    assert [part.start for part in rounds] == [0, *ends[:-1]]


@pytest.mark.parametrize("sizes", [{"most": 0}, {"round_size": 0}])
def test_too_few_draws_are_refused(sizes):
    ((name, value),) = sizes.items()
    expected = f"too few draws: got .*{name}={value}.*expected 1 or more of each"
    with pytest.raises(ValueError, match=expected):
        Adaptive(**sizes)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="nothing to predict: got no rows, expected one or more"):
        in_rounds(Saved(random_logits(4, 0, 2)), 0, Adaptive())


# The decision


@pytest.mark.parametrize("scale", [0.3, 2.0, 100.0])  # at 100 most are 0 or 1, and many sums tie
@pytest.mark.parametrize(("most", "round_size"), [(10, 2), (10, 1), (9, 3), (16, 4)])
def test_decided_rows_decide_as_all_draws_do(scale, most, round_size):
    rule = Adaptive(most=most, round_size=round_size)
    stopped = 0
    for classes in (2, 3, 5):
        logits = random_logits(most, 4000, classes, scale=scale, seed=classes)
        logits += random_logits(1, 4000, classes, scale=scale, seed=9)
        found = Saved(logits).under(rule)
        assert torch.equal(found.choice, Prediction.of(logits).choice)
        assert (2 * found.draws_used > most).all()
        stopped += (found.draws_used < most).sum().item()
    assert stopped > 1000  # of 12000; many more where the draws agree


def test_a_row_is_decided_as_soon_as_it_can_be_and_not_before():
    tie = [OTHER] * 3 + [SURE] * 3  # 3 to 3 in the end, and the first of equals is chosen
    even = [SURE] * 4 + [OTHER] * 2
    late = [SURE, OTHER, SURE, SURE, SURE, OTHER]
    # a lead of 0.52 a draw: 2.08 after four, with two to come; one of 0.48: 1.92
    narrow = [[math.log(0.76), math.log(0.24)]] * 6
    narrower = [[math.log(0.74), math.log(0.26)]] * 6
    found = Saved(table(tie, even, late, narrow, narrower)).under(Adaptive(most=6, round_size=1))
    assert found.draws_used.tolist() == [6, 4, 5, 4, 5]
    assert found.choice.tolist() == [0, 0, 0, 0, 0]


def test_each_row_has_the_predictive_of_its_own_draws():
    logits = random_logits(12, 300, 3, scale=2)
    logits[:, ::3, 2:] = -torch.inf  # options that a row does not have
    found = Saved(logits).under(Adaptive(most=12, round_size=1))
    assert set(found.draws_used.tolist()) == set(range(7, 13))
    for row, used in enumerate(found.draws_used.tolist()):
        own = Prediction.of(logits[:used, row : row + 1])
        for name in MEASURES:
            assert_close(getattr(found, name)[row], getattr(own, name)[0], rtol=0, atol=1e-12)


def test_rows_that_never_stop_have_the_plain_predictive():
    logits = random_logits(7, 50, 4, scale=0.01)
    found = Saved(logits).under(Adaptive(most=7, round_size=1))
    assert (found.draws_used == 7).all()
    assert_same(found, Prediction.of(logits), rtol=0, atol=1e-12)
    assert_same(AdaptivePrediction.of(logits), found, rtol=0, atol=1e-12)
    assert (AdaptivePrediction.of(logits).draws_used == 7).all()


# What is asked for


def test_only_what_is_used_is_asked_for():
    saved = Saved(random_logits(15, 200, 3))
    used = saved.under(Adaptive(most=15, round_size=4)).draws_used
    asked = sum(len(rows) * len(draws) for rows, draws in saved.asked)
    assert asked == used.sum() < 15 * 200
    assert saved.asked[0] == (list(range(200)), range(8))
    for row, count in enumerate(used.tolist()):
        drawn = []
        for rows, draws in saved.asked:
            drawn += list(draws) if row in rows else []
        assert drawn == list(range(count))


def test_nothing_is_asked_for_when_all_rows_are_decided():
    saved = Saved(table(*[[SURE] * 10] * 6))
    assert saved.under(Adaptive()).draws_used.tolist() == [6] * 6
    assert len(saved.asked) == 1


def test_narrow_rows_that_are_left_alone_are_widened():
    wide = [[9.0, 1.0, 0.0]] * 6
    narrow = [[1.0, 0.0, -math.inf], [0.0, 1.0, -math.inf]] * 3
    logits = table(wide, narrow)

    def source(rows, draws):
        values = logits[draws.start : draws.stop, rows]
        return values if 0 in rows else values[..., :2]

    found = in_rounds(source, 2, Adaptive(most=6))
    assert found.draws_used.tolist() == [4, 6]
    assert_same(found, Prediction.of(logits), rtol=0, atol=1e-12)


# On a model


@pytest.fixture
def opened(llama, byte_level, tiny_task):
    """A posterior some of whose rows are decided early, and its scorer."""
    posterior = random_gaussian(llama, byte_level, tiny_task, root_std=0.5)
    return posterior, posterior.scorer


@pytest.mark.parametrize("shared_prefix", [None, 3])
def test_a_model_draws_for_the_undecided_rows_only(opened, monkeypatch, shared_prefix):
    posterior, scorer = opened
    draws = Draws(10, seed=5, shared_prefix=shared_prefix)
    logits = row_logits(posterior, scorer, scorer.encode(ROWS), draws)
    passes = []
    compute = posterior.logits

    def noting(batch, draws):
        passes.append((batch["input_ids"].shape, draws))
        return compute(batch, draws)

    monkeypatch.setattr(posterior, "logits", noting)
    rule = Adaptive(round_size=1)
    found = predict_adaptively(posterior, scorer, ROWS, rule, draws=draws)
    expected = Saved(logits).under(rule)
    assert found.draws_used.tolist() == expected.draws_used.tolist()
    assert len(set(found.draws_used.tolist())) > 1
    assert_same(found, expected, rtol=1e-4, atol=1e-5)
    assert sum(shape[0] * draws.count for shape, draws in passes) == found.draws_used.sum()
    assert {(draws.seed, draws.shared_prefix) for _, draws in passes} == {(5, shared_prefix)}
    for part in rule.rounds():
        lengths = [shape[1] for shape, draws in passes if draws.first == part.start]
        assert lengths == sorted(lengths)  # batches by length, anew in each round


def test_two_draws_are_the_plain_predictive_of_a_model(opened):
    posterior, scorer = opened
    found = predict_adaptively(posterior, scorer, ROWS, Adaptive(most=2))
    for i, encoded in enumerate(scorer.encode(ROWS)):
        plain = predict(posterior, scorer.collate([encoded]), draws=2)
        count = len(ROWS[i].options)
        assert_close(found.probabilities[i, :count], plain.probabilities[0], rtol=0, atol=1e-6)
        assert_close(found.mutual_information[i], plain.mutual_information[0], rtol=0, atol=1e-6)


def test_bfloat16_reaches_the_passes(opened):
    posterior, scorer = opened
    rule = Adaptive(most=2)
    exact = predict_adaptively(posterior, scorer, ROWS[:2], rule)
    rough = predict_adaptively(posterior, scorer, ROWS[:2], rule, draws=Draws(bf16=True))
    assert 0 < (rough.probabilities - exact.probabilities).abs().max() < 0.2


def test_a_posterior_with_atoms_is_averaged_over_all_of_them(opened, llama, byte_level, tiny_task):
    _, scorer = opened
    values = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 1.0]])
    posterior = Atoms(llama(), values)
    rows = [row for row in ROWS if len(row.options) == 2]
    found = predict_adaptively(posterior, scorer, rows, Adaptive(most=10))
    assert [draws.indices for draws in posterior.asked] == [range(3)]
    assert found.draws_used.tolist() == [3] * len(rows)
    expected = values.double().softmax(-1).mean(0)
    assert_close(found.probabilities, expected.expand(len(rows), -1), rtol=0, atol=1e-12)
    model = attach(llama(), Lora(rank=2)).eval()
    own = make_scorer(model, byte_level, tiny_task)
    point = predict_adaptively(Point(model, own), scorer, ROWS[:3], Adaptive())
    assert point.draws_used.tolist() == [1, 1, 1]
