from dataclasses import replace

import pytest
import torch
from stand_ins import ROWS, Atoms, random_adapter, random_gaussian
from torch.testing import assert_close

from bayestune.evaluation import EvaluationOptions, evaluate_posterior
from bayestune.forward import Draws
from bayestune.posteriors import Point, Prediction
from bayestune.scoring import make_scorer, row_logits

OPTIONS = EvaluationOptions(prediction_batch=2)


@pytest.fixture(params=["letter", "text"])
def opened(request, llama, byte_level, tiny_task):
    """A random Gaussian posterior and its scorer."""
    posterior = random_gaussian(llama, byte_level, tiny_task, request.param)
    return posterior, posterior.scorer


def found(opened, options, **how):
    """What is evaluated, by number of draws."""
    posterior, scorer = opened
    all_of_them = evaluate_posterior(posterior, scorer, ROWS, options, progress=False, **how)
    return {one.draws: one for one in all_of_them}


def probabilities(opened, draws):
    posterior, scorer = opened
    rows = scorer.encode(ROWS)
    return Prediction.of(row_logits(posterior, scorer, rows, draws, batch_size=2)).probabilities


def test_rows_keep_their_order_whatever_the_batches(opened):
    posterior, scorer = opened
    rows = scorer.encode(ROWS)
    assert [row["length"] for row in rows] != sorted(row["length"] for row in rows)
    alone = [posterior.logits(scorer.collate([row]), Draws(3)) for row in rows]
    for size in (1, 2, 3, len(rows)):
        logits = row_logits(posterior, scorer, rows, Draws(3), batch_size=size)
        assert logits.shape == (3, 9, 4)
        for i, expected in enumerate(alone):
            count = len(ROWS[i].options)
            assert_close(logits[:, i, :count], expected[:, 0], rtol=1e-4, atol=1e-4)
            assert (logits[:, i, count:] == -torch.inf).all()


def test_fewer_draws_are_the_first_of_more(opened):
    one = found(opened, OPTIONS)
    assert list(one) == [0, 5, 10]
    for count in (0, 5, 10):
        expected = probabilities(opened, Draws(count))
        assert_close(one[count].prediction.probabilities, expected, rtol=1e-4, atol=1e-5)
    last_five = probabilities(opened, Draws(5, first=5))
    assert (one[5].prediction.probabilities - last_five).abs().max() > 0.01
    mean, draws = one[0].prediction, one[5].prediction
    assert mean.mutual_information.max() < 1e-9 < draws.mutual_information.min()


def test_draws_follow_their_seed(opened):
    one = found(opened, replace(OPTIONS, draws=(2,), draw_seed=7))
    expected = probabilities(opened, Draws(2, seed=7))
    assert_close(one[2].prediction.probabilities, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near_float32_and_not_the_same(opened):
    options = replace(OPTIONS, draws=(0, 1))
    exact, rough = found(opened, options), found(opened, options, bf16=True)
    for count in (0, 1):
        apart = exact[count].prediction.probabilities - rough[count].prediction.probabilities
        assert 0 < apart.abs().max() < 0.2


def test_a_shared_prefix_is_for_draws_and_not_for_the_mean(opened):
    one = found(opened, replace(OPTIONS, draws=(0, 3), shared_prefix=2))
    for count, prefix in ((0, None), (3, 2)):
        expected = probabilities(opened, Draws(count, shared_prefix=prefix))
        assert_close(one[count].prediction.probabilities, expected, rtol=1e-4, atol=1e-5)
    exact = probabilities(opened, Draws(3))
    assert (one[3].prediction.probabilities - exact).abs().max() > 0.01


def test_seconds_are_of_the_pass_that_was_timed(opened, monkeypatch):
    posterior, _ = opened
    asked = []
    clock = iter(range(100))
    compute = posterior.logits

    def noting(batch, draws):
        asked.append(draws.count)
        for _ in range(draws.count):
            next(clock)
        return compute(batch, draws)

    monkeypatch.setattr(posterior, "logits", noting)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    one = found(opened, replace(OPTIONS, draws=(0, 1, 3), prediction_batch=len(ROWS)))
    assert sorted(asked) == [0, 3]  # the pass of three draws serves one draw too
    assert [(n, one[n].seconds, one[n].timed_draws) for n in one] == [
        (0, 1, 0),
        (1, 4, 3),
        (3, 4, 3),
    ]


def test_a_posterior_with_atoms_is_evaluated_once_and_shares_no_prefix(
    llama, byte_level, tiny_task
):
    posterior = Atoms(llama(), torch.zeros(3, 4))
    scorer = make_scorer(posterior.model, byte_level, tiny_task)
    assert list(found((posterior, scorer), replace(OPTIONS, shared_prefix=2))) == [3]
    assert {(draws.count, draws.shared_prefix) for draws in posterior.asked} == {(3, None)}
    point = Point(random_adapter(llama), scorer)
    assert list(found((point, scorer), OPTIONS)) == [0]


def test_the_mean_of_a_posterior_without_one_is_refused(llama, byte_level, tiny_task):
    class Draughts(Atoms):
        atoms = None

        def __init__(self, model):
            self.model = model

    posterior = Draughts(llama())
    scorer = make_scorer(posterior.model, byte_level, tiny_task)
    with pytest.raises(ValueError, match="Draughts has no mean: got draws=0.*expected 1 or more"):
        evaluate_posterior(posterior, scorer, ROWS, replace(OPTIONS, draws=(0,)))
    with pytest.raises(ValueError, match=r"nothing to evaluate: got draws=\[\], expected such as"):
        EvaluationOptions(draws=())
