import pytest
import torch

from bayestune.errors import Refusal
from bayestune.forward import Draws
from bayestune.methods import MLE, BLoB, Distilled, MCDropout, WithTraining
from bayestune.posteriors import Dropout, Point, Scaled


def test_token_masks_are_lora_dropout_and_the_mean_has_none(case):
    posterior = case.fit(MCDropout(dropout=0.5))
    assert isinstance(posterior, Dropout)
    state = torch.get_rng_state()
    first = posterior.logits(case.batch, Draws(4))
    assert torch.equal(posterior.logits(case.batch, Draws(4)), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(posterior.logits(case.batch, Draws(4, seed=1)), first)
    mean = Point(posterior.model, case.scorer).logits(case.batch, Draws(0))
    assert torch.equal(posterior.logits(case.batch, Draws(0)), mean)


def test_held_masks_drop_columns_and_average_to_the_mean(case):
    posterior = case.fit(MCDropout(dropout=0.25, masks="held"))
    assert isinstance(posterior, Scaled)
    name, weight = next(iter(posterior.slots.weights().items()))
    ratio = torch.stack([posterior.draw(index)[name] for index in range(4000)]) / weight
    torch.testing.assert_close(ratio.amin(1), ratio.amax(1))  # whole columns
    kept = (ratio[:, 0] > 0).float()
    torch.testing.assert_close(ratio[:, 0], kept / 0.75)
    assert (kept.mean(0) - 0.75).abs().max() / (0.75 * 0.25 / 4000) ** 0.5 < 4.5


@pytest.mark.parametrize("dropout", [0, 1])
def test_a_probability_out_of_range_is_refused(dropout):
    with pytest.raises(ValueError, match=rf"dropout must lie in \(0, 1\): got {dropout}"):
        MCDropout(dropout=dropout)


def test_a_base_that_is_not_a_point_or_has_no_dropout_is_refused(case):
    message = "MCDropout builds on a point: got a Gaussian from its base, expected a Point"
    with pytest.raises(ValueError, match=message):
        case.fit(MCDropout(base=BLoB()))
    with pytest.raises(ValueError, match="the adapter has no dropout: got lora_dropout=0"):
        Dropout(case.fit(MLE()).model, case.scorer)


@pytest.mark.parametrize("masks", ["token", "held"])
def test_a_base_that_was_trained_without_the_dropout_is_refused(case, masks):
    student = Distilled(MLE(), steps=2)  # trains without any
    for base in (student, WithTraining(MLE(), {"lora": {"dropout": 0.0}})):
        with pytest.raises(Refusal, match=r"a base trained with a dropout of 0.0, expected 0.1"):
            case.fit(MCDropout(base, masks=masks))
