"""Draws as functions, many draws in one pass, the predictive and its uncertainty."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bayestune.adapters import GaussianLinear, Slots, bayesify
from bayestune.forward import Draws, repeat_rows
from bayestune.posteriors import Gaussian, Point, Prediction, predict

OPTIONS = [5, 9, 30]


def score(model: nn.Module, batch) -> torch.Tensor:
    return model(input_ids=batch["input_ids"]).logits[:, -1, OPTIONS]


@pytest.fixture
def posterior(llama) -> Gaussian:
    torch.manual_seed(1)
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj", "lm_head"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    bayesify(model, init_root_std=0.5)
    return Gaussian(model, score)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 400, (4, 9), generator=torch.Generator().manual_seed(0))}


def test_ten_draws_in_one_pass_are_ten_passes(posterior, batch):
    together = posterior.logits(batch, Draws(10, seed=3))
    assert together.shape == (10, 4, 3)
    layers = Slots(posterior.model).of_kind(GaussianLinear)
    for index in range(10):
        weights = posterior.draw(index, seed=3)
        kept = {path: layer.weight.detach().clone() for path, layer in layers.items()}
        with torch.no_grad():
            for path, layer in layers.items():
                layer.weight.copy_(weights[path])
            alone = score(posterior.model.eval(), batch)
            for path, layer in layers.items():
                layer.weight.copy_(kept[path])
        torch.testing.assert_close(together[index], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "bounds", [{"max_rows": 4}, {"max_rows": 11}, {"max_tokens": 100}, {"max_tokens": 1}]
)
def test_chunks_change_nothing(posterior, batch, bounds):
    torch.testing.assert_close(
        posterior.logits(batch, Draws(7, **bounds)),
        posterior.logits(batch, Draws(7)),
        atol=1e-5,
        rtol=1e-5,
    )


def test_bounds_bound_the_rows_of_a_pass(posterior, batch):
    rows = []
    posterior.scorer = lambda model, b: rows.append(b["input_ids"].shape[0]) or score(model, b)
    posterior.logits(batch, Draws(10, max_rows=13))
    assert rows == [12, 12, 12, 4]
    rows.clear()
    posterior.logits(batch, Draws(10, max_tokens=4 * 9 * 5))
    assert rows == [20, 20]


def test_a_draw_does_not_depend_on_the_batch_nor_on_the_other_draws(posterior, batch):
    whole = posterior.logits(batch, Draws(5))
    torch.testing.assert_close(posterior.logits(batch, Draws(2)), whole[:2], atol=1e-5, rtol=1e-5)
    one = {"input_ids": batch["input_ids"][2:3]}
    torch.testing.assert_close(posterior.logits(one, Draws(5)), whole[:, 2:3], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(posterior.logits(batch, Draws(5, seed=1)), whole)


def test_draws_follow_the_posterior_when_it_changes(posterior, batch):
    before = posterior.logits(batch, Draws(2))
    with torch.no_grad():
        next(iter(Slots(posterior.model).of_kind(GaussianLinear).values())).root_std.mul_(2)
    assert not torch.allclose(posterior.logits(batch, Draws(2)), before)


def test_draws_have_the_posteriors_moments(posterior):
    path, layer = next(iter(Slots(posterior.model).of_kind(GaussianLinear).items()))
    draws = torch.stack([posterior.draw(i)[path] for i in range(2000)])
    assert ((draws.mean(0) - layer.weight) / (layer.std / math.sqrt(2000))).abs().max() < 4.5
    assert (draws.var(0) / layer.std.square() - 1).abs().max() < 4.5 * math.sqrt(2 / 2000)


def test_no_draws_is_the_mean(posterior, batch):
    mean = posterior.logits(batch, Draws(0))
    assert mean.shape == (1, 4, 3)
    with torch.no_grad():
        torch.testing.assert_close(mean[0], score(posterior.model.eval(), batch))


def test_the_models_mode_and_weights_are_left_alone(posterior, batch):
    posterior.model.train()
    before = {name: value.clone() for name, value in posterior.model.state_dict().items()}
    predict(posterior, batch, 3)
    assert posterior.model.training
    after = posterior.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_variance_of_the_predictive_is_not_zero(posterior, batch):
    assert posterior.logits(batch, Draws(8)).var(0).min() > 0
    assert predict(posterior, batch, 8).mutual_information.min() > 0


def test_predict_averages_probabilities_and_splits_entropy(posterior, batch):
    logits = posterior.logits(batch, Draws(6)).double()
    prediction = predict(posterior, batch, draws=6)
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(prediction.probabilities, probabilities.mean(0))
    entropies = torch.distributions.Categorical(probs=probabilities).entropy().mean(0)
    torch.testing.assert_close(prediction.expected_entropy, entropies)
    total = torch.distributions.Categorical(probs=probabilities.mean(0)).entropy()
    torch.testing.assert_close(prediction.total_entropy, total)
    torch.testing.assert_close(prediction.mutual_information, total - entropies)
    torch.testing.assert_close(prediction.confidence, probabilities.mean(0).max(-1).values)
    assert torch.equal(prediction.choice, probabilities.mean(0).argmax(-1))


def test_options_that_a_row_has_not_take_no_part():
    prediction = Prediction.of(torch.tensor([[[0.0, 0.0, -math.inf]]]))
    assert prediction.probabilities.tolist() == [[0.5, 0.5, 0.0]]
    assert prediction.total_entropy.item() == pytest.approx(math.log(2))


def test_a_point_is_the_same_for_every_draw(posterior, batch):
    point = Point(posterior.model, score)
    assert point.logits(batch, Draws(0)).shape == (1, 4, 3)
    logits = point.logits(batch, Draws(3))
    assert logits.shape == (3, 4, 3)
    assert torch.equal(logits[0], logits[2])
    assert predict(point, batch, 3).mutual_information.max() == 0


def test_repeating_rows_goes_copy_by_copy():
    repeated = repeat_rows({"a": torch.tensor([1, 2]), "b": torch.tensor([[1], [2]])}, 2)
    assert repeated["a"].tolist() == [1, 2, 1, 2]
    assert repeated["b"].tolist() == [[1], [2], [1], [2]]


def test_bad_requests_are_refused(posterior, batch, llama):
    class Meanless(Point):
        @property
        def has_mean(self) -> bool:
            return False

    with pytest.raises(
        ValueError, match="Meanless has no mean: got draws=0, .* expected 1 or more"
    ):
        predict(Meanless(posterior.model, score), batch, 0)
    with pytest.raises(ValueError, match="got count=-1, first=0, expected neither to be negative"):
        predict(posterior, batch, -1)
    with pytest.raises(ValueError, match="the model has no Gaussian layer"):
        Gaussian(llama(), score)
