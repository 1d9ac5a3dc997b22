"""Adaptive draws on logits that are known functions of row and draw, and on a tiny model."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from bayestune import Adaptive, predict_adaptively
from bayestune.adapters import Lora, adapted_layers, attach, bayesify
from bayestune.data import Question
from bayestune.evaluation.adaptive import AdaptivePrediction, in_rounds
from bayestune.forward import Draws
from bayestune.posteriors import Gaussian, Point, Prediction, predict
from bayestune.scoring import make_scorer, row_logits

SURE, OTHER = [30.0, -30.0], [-30.0, 30.0]  # probabilities of 1 and 0, exactly 1 in float64


class Saved:
    """Logits (S, N, C) as a source, which notes what it is asked for."""

    def __init__(self, logits):
        self.logits, self.asked = logits, []

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
    for name in ("probabilities", "total_entropy", "expected_entropy", "mutual_information"):
        assert_close(getattr(one, name), getattr(other, name), **how)


# The rounds


@pytest.mark.parametrize(
    ("rule", "ends"),
    [
        (Adaptive(), [4, 6, 8, 10]),
        (Adaptive(most=9, least=2, round_size=3), [2, 5, 8, 9]),
        (Adaptive(most=3, least=5), [3]),
        (Adaptive(most=1), [1]),
    ],
)
def test_rounds_go_on_where_the_last_ended(rule, ends):
    rounds = list(rule.rounds())
    assert [part.stop for part in rounds] == ends
    assert [part.start for part in rounds] == [0, *ends[:-1]]


@pytest.mark.parametrize(
    "rule", [Adaptive(most=7), Adaptive(most=7, least=2, round_size=1, standard_error=1e-12)]
)
def test_rows_that_never_stop_have_the_plain_predictive(rule):
    logits = random_logits(7, 50, 4, scale=3)
    logits[:, ::3, 2:] = -torch.inf  # options that a row has not
    found = Saved(logits).under(rule)
    assert_same(found, Prediction.of(logits), rtol=0, atol=1e-12)
    assert (found.draws_used == 7).all()
    assert found.total_draws == 7 * 50
    assert_same(AdaptivePrediction.of(logits), found, rtol=0, atol=1e-12)
    assert (AdaptivePrediction.of(logits).draws_used == found.draws_used).all()


def test_a_single_draw_has_no_standard_error_and_needs_none():
    logits = random_logits(1, 5, 3)
    found = Saved(logits).under(Adaptive(most=1, standard_error=0.5, decided=True))
    assert_same(found, Prediction.of(logits), rtol=0, atol=1e-12)
    assert found.mutual_information.max() < 1e-12


# The standard error


def test_rows_without_variance_stop_after_the_least():
    logits = random_logits(12, 30, 3, scale=2)
    logits[:, ::2] = logits[:1, ::2]
    found = Saved(logits).under(Adaptive(most=12, least=5, round_size=3, standard_error=1e-6))
    assert (found.draws_used[::2] == 5).all()
    assert (found.draws_used[1::2] == 12).all()


def test_a_row_stops_at_the_first_round_whose_standard_error_is_small_enough():
    rule = Adaptive(most=20, least=4, round_size=3, standard_error=0.06)
    logits = random_logits(20, 400, 3)
    found, probabilities = Saved(logits).under(rule), logits.double().softmax(-1)
    ends = [part.stop for part in rule.rounds()]
    errors = {n: (probabilities[:n].std(0) / math.sqrt(n)).amax(-1) for n in ends}
    for row, used in enumerate(found.draws_used.tolist()):
        assert all(errors[n][row] > 0.06 for n in ends if n < used)
        assert used == 20 or errors[used][row] <= 0.06
        own = Prediction.of(logits[:used, row : row + 1])
        assert_close(found.probabilities[row], own.probabilities[0], rtol=0, atol=1e-12)
        assert_close(found.mutual_information[row], own.mutual_information[0], rtol=0, atol=1e-12)
    assert set(found.draws_used.tolist()) == set(ends)


def test_the_bias_of_stopping_is_what_the_docstring_says():
    """One draw in ten dissents: the expectations of both predictives are known."""
    num_rows, high, low, rate = 20_000, 0.99, 0.01, 0.1
    dissents = torch.rand(10, num_rows, generator=torch.Generator().manual_seed(1)) < rate
    first = torch.where(dissents, low, high).double()
    logits = torch.stack([first.log(), (1 - first).log()], -1)
    found = Saved(logits).under(Adaptive(most=10, least=4, round_size=6, standard_error=0.01))
    agreed = (~dissents[:4]).all(0) | dissents[:4].all(0)
    assert ((found.draws_used == 4) == agreed).all()
    plain, mean = Prediction.of(logits).probabilities[:, 0], high - rate * (high - low)
    assert plain.mean().item() == pytest.approx(mean, abs=4 * plain.std().item() / num_rows**0.5)
    all_high, all_low = (1 - rate) ** 4, rate**4
    shift = 0.6 * (
        all_high * (high - mean) + all_low * (low - mean)
    )  # a stopped row forgoes six draws of mean `mean`
    difference = found.probabilities[:, 0] - plain
    assert difference.mean().item() == pytest.approx(
        shift, abs=4 * difference.std().item() / num_rows**0.5
    )
    assert shift > 0.03


# The decision


@pytest.mark.parametrize(
    "scale", [0.3, 2.0, 100.0]
)  # at 100 most draws are exactly 0 and 1, and many sums tie
@pytest.mark.parametrize(
    ("most", "least", "round_size"), [(10, 4, 2), (10, 2, 1), (9, 4, 3), (16, 8, 4)]
)
def test_decided_rows_decide_as_all_draws_do(scale, most, least, round_size):
    rule = Adaptive(most=most, least=least, round_size=round_size, decided=True)
    stopped = 0
    for classes in (1, 2, 3, 5):
        logits = random_logits(most, 4000, classes, scale=scale, seed=classes)
        logits += random_logits(1, 4000, classes, scale=scale, seed=9)
        found, whole = Saved(logits).under(rule), Prediction.of(logits)
        assert torch.equal(found.choice, whole.choice)
        assert ((found.draws_used == most) | (2 * found.draws_used > most) | (classes == 1)).all()
        stopped += (found.draws_used < most).sum().item()
    assert stopped > 4000


def test_a_row_is_decided_as_soon_as_it_can_be_and_not_before():
    tie = [OTHER] * 3 + [SURE] * 3  # 3 to 3 in the end, and the first of equals is chosen
    even = [SURE] * 4 + [OTHER] * 2
    late = [SURE, OTHER, SURE, SURE, SURE, OTHER]
    narrow = [
        [math.log(0.76), math.log(0.24)]
    ] * 6  # a lead of 0.52 a draw: 2.08 after four, with two to come
    narrower = [[math.log(0.74), math.log(0.26)]] * 6  # 0.48: 1.92
    logits = table(tie, even, late, narrow, narrower)
    found = Saved(logits).under(Adaptive(most=6, least=3, round_size=1, decided=True))
    assert found.draws_used.tolist() == [6, 4, 5, 4, 5]
    assert found.choice.tolist() == [0, 0, 0, 0, 0]


def test_either_rule_is_enough():
    known = [[0.1, 0.0]] * 8  # no variance, but a narrow lead
    both_hold = [SURE] * 6 + [OTHER] * 2
    mixed = [OTHER, *[SURE] * 6, OTHER]
    logits = table(known, both_hold, mixed)
    both = Adaptive(most=8, least=4, round_size=1, standard_error=0.01, decided=True)
    assert Saved(logits).under(both).draws_used.tolist() == [4, 4, 6]
    assert Saved(logits).under(replace(both, standard_error=None)).draws_used.tolist() == [8, 5, 6]
    assert Saved(logits).under(replace(both, decided=False)).draws_used.tolist() == [4, 4, 8]


# What is asked for


def test_only_what_is_used_is_asked_for():
    saved = Saved(random_logits(15, 200, 3))
    found = saved.under(Adaptive(most=15, least=3, round_size=4, standard_error=0.08, decided=True))
    assert (
        sum(len(rows) * len(draws) for rows, draws in saved.asked) == found.total_draws < 15 * 200
    )
    assert saved.asked[0] == (list(range(200)), range(3))
    for row, used in enumerate(found.draws_used.tolist()):
        assert [i for rows, draws in saved.asked if row in rows for i in draws] == list(range(used))


def test_nothing_is_asked_for_when_all_rows_have_stopped():
    saved = Saved(random_logits(1, 6, 2).expand(10, -1, -1))
    assert saved.under(Adaptive(standard_error=0.1)).total_draws == 4 * 6
    assert len(saved.asked) == 1


def test_narrow_rows_that_are_left_alone_are_widened():
    wide, narrow = [[3.0, 1.0, 0.0]] * 6, [[1.0, 0.0, -math.inf], [0.0, 1.0, -math.inf]] * 3
    logits = table(wide, narrow)

    def source(rows, draws):
        values = logits[draws.start : draws.stop, rows]
        return values if 0 in rows else values[..., :2]

    found = in_rounds(source, 2, Adaptive(most=6, least=2, standard_error=0.01))
    assert found.draws_used.tolist() == [2, 6]
    assert_same(found, Prediction.of(logits), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [{"most": 0}, {"least": 1}, {"round_size": 0}])
def test_too_few_draws_are_refused(sizes):
    (name, value), *_ = sizes.items()
    with pytest.raises(
        ValueError, match=f"too few draws: got .*{name}={value}.*expected 1, 2 and 1 or more"
    ):
        Adaptive(**sizes)


@pytest.mark.parametrize("error", [0.0, -0.1, math.nan])
def test_a_standard_error_that_is_never_reached_is_refused(error):
    with pytest.raises(
        ValueError,
        match=f"only reached if it is positive: got {error}, expected such as 0.02; None",
    ):
        Adaptive(standard_error=error)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="nothing to predict: got no rows, expected one or more"):
        in_rounds(Saved(random_logits(4, 0, 2)), 0, Adaptive())


# On a model


WORDS = ("sky", "red", "grass", "blue", "the", "A", "B", "C", "D")


def row(i):
    question = f"{WORDS[i]} is {'the answer for the passage ' * (i % 4)}red?"
    return Question(f"{i}", question, ("sky", "grass", "red")[: 2 + i % 2], 0)


ROWS = tuple(row(i) for i in range(9))


@pytest.fixture
def opened(llama, byte_level, tiny_task):
    """A random Gaussian posterior and its scorer."""
    model = attach(llama(initializer_range=0.2), Lora(rank=4))
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    bayesify(model, init_root_std=0.7)
    scorer = make_scorer(model, byte_level, replace(tiny_task, evaluation=ROWS), "letter")
    return Gaussian(model.eval(), scorer), scorer


def rule_between(logits):
    """With a standard error between those that the rows have after four draws, and no row's own."""
    errors = (logits[:4].double().softmax(-1).std(0) / 2).amax(-1).sort().values
    middle = len(errors) // 2
    return Adaptive(least=4, standard_error=errors[middle - 1 : middle + 1].mean().item())


@pytest.mark.parametrize("shared_prefix", [None, 3])
def test_a_model_draws_for_the_unfinished_rows_only(opened, monkeypatch, shared_prefix):
    posterior, scorer = opened
    how = {"seed": 5, "shared_prefix": shared_prefix}
    logits = row_logits(posterior, scorer, scorer.encode(ROWS), Draws(10, **how))
    rule, passes, compute = rule_between(logits), [], posterior.logits

    def noting(batch, draws):
        passes.append((batch["input_ids"].shape, draws))
        return compute(batch, draws)

    monkeypatch.setattr(posterior, "logits", noting)
    found = predict_adaptively(posterior, scorer, ROWS, rule, batch_size=2, **how)
    expected = Saved(logits).under(rule)
    assert found.draws_used.tolist() == expected.draws_used.tolist()
    assert len(set(found.draws_used.tolist())) > 1
    assert_same(found, expected, rtol=1e-4, atol=1e-5)
    assert (
        sum(shape[0] * draws.count for shape, draws in passes) == found.total_draws < 10 * len(ROWS)
    )
    assert {(draws.seed, draws.shared_prefix) for _, draws in passes} == {(5, shared_prefix)}
    for part in rule.rounds():
        lengths = [shape[1] for shape, draws in passes if draws.first == part.start]
        assert lengths == sorted(lengths)  # batches by length, anew in each round


def test_no_rule_is_the_plain_predictive_of_a_model(opened):
    posterior, scorer = opened
    found = predict_adaptively(posterior, scorer, ROWS, Adaptive(most=5, least=2))
    for i, row in enumerate(scorer.encode(ROWS)):
        plain = predict(posterior, scorer.collate([row]), draws=5)
        count = len(ROWS[i].options)
        assert_close(found.probabilities[i, :count], plain.probabilities[0], rtol=0, atol=1e-6)
        assert_close(found.mutual_information[i], plain.mutual_information[0], rtol=0, atol=1e-6)


def test_bfloat16_reaches_the_passes(opened):
    posterior, scorer = opened
    exact, rough = (
        predict_adaptively(posterior, scorer, ROWS[:2], Adaptive(most=2), bf16=bf16)
        for bf16 in (False, True)
    )
    assert 0 < (rough.probabilities - exact.probabilities).abs().max() < 0.2


def test_the_rounds_are_titled(opened, capsys):
    posterior, scorer = opened
    predict_adaptively(posterior, scorer, ROWS[:2], Adaptive(most=5), progress=True)
    shown = capsys.readouterr().err
    assert "predict, draws 1 to 4" in shown
    assert "predict, draws 5 to 5" in shown


class Atoms:
    """A posterior of three atoms, whose logits know the draw."""

    atoms, has_mean = 3, False

    def __init__(self, model):
        self.model, self.asked = model, []

    def logits(self, inputs, draws):
        self.asked.append(draws.indices)
        values = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]])[list(draws.indices)]
        return values[:, None].expand(-1, len(inputs["input_ids"]), -1)


def test_a_posterior_with_atoms_is_averaged_over_all_of_them(opened, llama, byte_level, tiny_task):
    _, scorer = opened
    posterior = Atoms(llama())
    easy = Adaptive(most=10, least=2, standard_error=0.5, decided=True)
    found = predict_adaptively(posterior, scorer, ROWS[:2], easy)
    assert posterior.asked == [range(3)]
    assert found.draws_used.tolist() == [3, 3]
    expected = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]]).double().softmax(-1).mean(0)
    assert_close(found.probabilities, expected.expand(2, -1), rtol=0, atol=1e-12)
    model = attach(llama(), Lora(rank=2)).eval()
    point = predict_adaptively(
        Point(model, make_scorer(model, byte_level, tiny_task)), scorer, ROWS[:3], easy
    )
    assert point.draws_used.tolist() == [1, 1, 1]
