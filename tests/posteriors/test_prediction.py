"""The predictive averages probabilities, and its uncertainty is that of the draws."""

import math

import pytest
import torch
from torch.distributions import Categorical
from torch.testing import assert_close

from bayestune.forward import Draws
from bayestune.posteriors import (
    Gaussian,
    Linearised,
    Mixture,
    Point,
    Prediction,
    count_for,
    predict,
)
from tiny import BATCH, adapted, converted, end_logits, tiny_llama, with_second


@pytest.fixture
def posterior() -> Gaussian:
    return Gaussian(converted(tiny_llama()), end_logits)


def test_predict_averages_probabilities_and_splits_entropy(posterior):
    prediction = predict(posterior, BATCH, 6, seed=1)
    probabilities = posterior.logits(BATCH, Draws(6, seed=1)).double().softmax(-1)
    mean = probabilities.mean(0)
    assert_close(prediction.probabilities, mean)
    expected = Categorical(probs=probabilities).entropy().mean(0)
    total = Categorical(probs=mean).entropy()
    assert_close(prediction.expected_entropy, expected)
    assert_close(prediction.total_entropy, total)
    assert_close(prediction.mutual_information, (total - expected) * 6 / 5)
    assert_close(prediction.log_probabilities, mean.log())
    assert prediction.mutual_information.min() > 0
    assert_close(prediction.confidence, mean.max(-1).values)
    assert torch.equal(prediction.choice, mean.argmax(-1))


def test_draws_say_all_that_the_other_arguments_say(posterior):
    seen = []
    posterior.logits = lambda batch, draws: seen.append(draws) or torch.zeros(1, 2, 5)
    predict(posterior, BATCH, 4, seed=3, max_tokens=99, shared_prefix=7)
    predict(posterior, BATCH, Draws(4, 3, max_tokens=99, shared_prefix=7))
    assert seen == [Draws(4, 3, max_tokens=99, shared_prefix=7)] * 2


def test_options_that_a_row_does_not_have_take_no_part():
    prediction = Prediction.of(torch.tensor([[[0.0, 0.0, -math.inf]]]))
    assert prediction.probabilities.tolist() == [[0.5, 0.5, 0.0]]
    assert prediction.total_entropy.item() == pytest.approx(math.log(2))


def test_a_single_draw_is_as_sure_as_the_draw():
    prediction = Prediction.of(torch.randn(1, 100, 4))
    assert torch.equal(prediction.mutual_information, torch.zeros(100, dtype=torch.float64))


def test_a_posterior_with_atoms_is_averaged_over_them():
    model = with_second(adapted(tiny_llama()))
    point = Point(model, end_logits)
    both = Mixture([point, Point(model, end_logits, adapter="b")])
    assert (count_for(point, 10), count_for(both, 10), count_for(point, 0)) == (1, 2, 0)
    expected = both.logits(BATCH, Draws(2)).double().softmax(-1).mean(0)
    found = predict(both, BATCH, 5)
    assert_close(found.probabilities, expected)
    assert_close(found.mutual_information, found.total_entropy - found.expected_entropy)
    assert Linearised(model, end_logits, {}, 1.0).atoms == 1000


def test_a_mean_that_is_not_there_and_negative_draws_are_refused(posterior):
    class Meanless(Point):
        has_mean = False

    with pytest.raises(ValueError, match="Meanless has no mean: got draws=0, .*expected 1 or more"):
        predict(Meanless(posterior.model, end_logits), BATCH, 0)
    with pytest.raises(ValueError, match="got count=-1, first=0, expected neither to be negative"):
        predict(posterior, BATCH, -1)


def test_rows_that_are_predicted_in_parts_are_those_predicted_at_once():
    logits = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0))
    logits[:, 2, 2] = -torch.inf
    whole = Prediction.of(logits)
    joined = Prediction.joined([Prediction.of(part) for part in logits.split(3, dim=1)])
    for name in ("probabilities", "total_entropy", "expected_entropy", "mutual_information"):
        assert_close(getattr(joined, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    assert_close(joined.drawn, whole.drawn, rtol=1e-12, atol=1e-12)
    assert torch.equal(joined.with_draws(2).drawn, joined.drawn[:2])
