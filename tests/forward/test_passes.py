"""Many draws in one pass are the draws one by one, for any model, adapter and batch."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bayestune.adapters import GaussianLinear, Slots, bayesify
from bayestune.forward import Draws
from bayestune.posteriors import Gaussian, Mixture, Point, predict
from tiny import BATCH, CLOSE, converted, end_logits, one_by_one, passes, tiny_llama, with_second


@pytest.fixture
def posterior() -> Gaussian:
    targets = ["q_proj", "v_proj", "lm_head"]
    return Gaussian(converted(tiny_llama(), target_modules=targets), end_logits)


class Net(nn.Module):
    """What PEFT documents as a custom model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.outer = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x).relu())


BOUNDS = [{}, {"max_rows": 7}, {"max_tokens": 1}]


@pytest.mark.parametrize("bounds", BOUNDS)
def test_a_pass_of_many_draws_is_a_pass_for_each(posterior, bounds):
    draws = Draws(7, seed=3, first=1, **bounds)
    logits = posterior.logits(BATCH, draws)
    assert_close(logits, one_by_one(posterior, BATCH, draws), **CLOSE)
    assert logits.var(0).min() > 0


@pytest.mark.parametrize("bounds", BOUNDS)
def test_a_plain_module_under_peft(bounds):
    model = converted(Net(), target_modules=["inner"], task_type=None)
    posterior = Gaussian(model, lambda model, batch: model(batch["x"]))
    batch = {"x": torch.randn(5, 6)}
    draws = Draws(3, **bounds)
    assert_close(posterior.logits(batch, draws), one_by_one(posterior, batch, draws), **CLOSE)
    assert predict(posterior, batch, 3).mutual_information.min() > 0


def test_a_batch_of_embeddings(posterior):
    embedding = posterior.model.get_input_embeddings()
    batch = {"inputs_embeds": embedding(BATCH["input_ids"]).detach()}
    seen = passes(posterior.model)
    found = posterior.logits(batch, Draws(4, max_tokens=2 * 24))
    assert seen == [(4, 12), (4, 12)]
    assert_close(found, posterior.logits(BATCH, Draws(4)), **CLOSE)


# Adapters beside each other


@pytest.fixture
def two() -> nn.Module:
    """A model with the Gaussian adapters "default" and "b", of which "default" is active."""
    model = with_second(converted(tiny_llama(), root_std=0.3))
    bayesify(model, init_root_std=0.6, adapter="b")
    return model.eval()


@pytest.mark.parametrize("count", [0, 3])
def test_a_posterior_is_its_own_adapters_whichever_is_active(two, count):
    draws = Draws(count)
    posteriors = [Gaussian(two, end_logits, adapter=name) for name in ("default", "b")]
    expected = []
    for posterior in posteriors:
        two.set_adapter(posterior.adapter)
        if count:
            expected.append(one_by_one(posterior, BATCH, draws))
        else:
            with torch.no_grad():
                expected.append(end_logits(two, BATCH)[None])
    assert not torch.allclose(*expected, atol=1e-2)
    for now in ("default", "b"):
        two.set_adapter(now)
        trainable = [parameter.requires_grad for parameter in two.parameters()]
        for posterior, logits in zip(posteriors, expected, strict=True):
            assert_close(posterior.logits(BATCH, draws), logits, **CLOSE)
        assert two.active_adapter == now
        assert [parameter.requires_grad for parameter in two.parameters()] == trainable


def test_adapters_that_are_active_beside_it_stay_so(two):
    two.base_model.set_adapter(["default", "b"])
    posterior = Gaussian(two, end_logits, adapter="b")
    expected = one_by_one(posterior, BATCH, Draws(3))
    assert_close(posterior.logits(BATCH, Draws(3)), expected, **CLOSE)
    assert two.active_adapters == ["default", "b"]


def test_a_mixture_runs_whichever_adapter_is_active(two):
    members = [Gaussian(two, end_logits), Point(two, end_logits, adapter="b")]
    mixture = Mixture(members)
    expected = mixture.logits(BATCH, Draws(4))
    assert_close(expected[1], members[1].logits(BATCH, Draws(0))[0], **CLOSE)
    for active in (["b"], ["default", "b"]):
        two.base_model.set_adapter(active)
        assert_close(mixture.logits(BATCH, Draws(4)), expected, **CLOSE)
        assert two.active_adapters == active


# What is kept between batches


def test_draws_are_made_once_and_anew_when_the_model_or_the_seed_changes(posterior, monkeypatch):
    made = []
    draw = Gaussian.draw
    monkeypatch.setattr(Gaussian, "draw", lambda *which: made.append(which[1:]) or draw(*which))
    for count in (2, 3, 2):
        before = posterior.logits(BATCH, Draws(count))
    assert made == [(0, 0), (1, 0), (2, 0)]
    with torch.no_grad():
        next(iter(Slots(posterior.model).of_kind(GaussianLinear).values())).root_std.mul_(2)
    assert not torch.allclose(posterior.logits(BATCH, Draws(2)), before)
    assert not torch.allclose(posterior.logits(BATCH, Draws(2, seed=1)), before)
    assert made[3:] == [(0, 0), (1, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize("draws", [0, 3])
def test_a_warm_prediction_walks_the_module_tree_at_most_twice(posterior, draws, monkeypatch):
    predict(posterior, BATCH, draws)
    walks = []
    plain = nn.Module.named_modules

    def counted(self, memo=None, prefix="", remove_duplicate=True):
        if self is posterior.model and memo is None:
            walks.append(self)
        return plain(self, memo, prefix, remove_duplicate)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    predict(posterior, BATCH, draws)
    assert len(walks) <= 2
