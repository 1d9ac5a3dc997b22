"""Draws run through models that are not transformers language models, at the price of two walks."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bayestune.adapters import Slots, bayesify
from bayestune.forward import Draws
from bayestune.posteriors import Gaussian, Point, predict
from tiny import tiny_llama

IDS = torch.arange(3, 27).reshape(2, 12)


def randomised(model: nn.Module, std: float = 0.4) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    bayesify(model, init_root_std=std)
    return model.eval()


@pytest.fixture
def language_model():
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return randomised(get_peft_model(tiny_llama(), config))


class Net(nn.Module):
    """What PEFT documents as a custom model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.outer = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x).relu())


def one_by_one(posterior: Gaussian, inputs, count: int) -> torch.Tensor:
    """Each draw in a model of its own."""
    found = []
    for index in range(count):
        model = copy.deepcopy(posterior.model)
        modules = Slots(model).modules()
        with torch.no_grad():
            for name, weight in posterior.draw(index).items():
                modules[name].weight.copy_(weight)
            found.append(posterior.scorer(model, inputs))
    return torch.stack(found)


@pytest.mark.parametrize("bounds", [{}, {"max_rows": 7}, {"max_tokens": 1}])
def test_a_plain_module_under_peft(bounds):
    torch.manual_seed(1)
    model = randomised(get_peft_model(Net(), LoraConfig(r=2, target_modules=["inner"])))
    posterior = Gaussian(model, lambda model, batch: model(batch["x"]))
    batch = {"x": torch.randn(5, 6)}
    logits = posterior.logits(batch, Draws(3, **bounds))
    torch.testing.assert_close(logits, one_by_one(posterior, batch, 3), rtol=1e-5, atol=1e-5)
    assert predict(posterior, batch, 3).mutual_information.min() > 0


def test_a_batch_of_embeddings(language_model):
    def last(model, batch):
        return model(inputs_embeds=batch["inputs_embeds"]).logits[:, -1, :5]

    embeddings = language_model.get_input_embeddings()(IDS).detach()
    posterior = Gaussian(language_model, last)
    batch = {"inputs_embeds": embeddings}
    logits = posterior.logits(batch, Draws(3))
    torch.testing.assert_close(logits, one_by_one(posterior, batch, 3), rtol=1e-5, atol=1e-5)
    rows = []
    posterior.scorer = lambda m, b: rows.append(len(b["inputs_embeds"])) or last(m, b)
    posterior.logits(batch, Draws(4, max_tokens=2 * IDS.numel()))
    assert rows == [4, 4]


def last_of_ids(model, batch):
    return model(**batch, logits_to_keep=1).logits[:, -1, :5]


@pytest.mark.parametrize("draws", [0, 3])
def test_a_warm_prediction_walks_the_module_tree_at_most_twice(language_model, draws, monkeypatch):
    posterior = Gaussian(language_model, last_of_ids)
    predict(posterior, {"input_ids": IDS}, draws)
    walks = []
    plain = nn.Module.named_modules

    def counted(self, memo=None, prefix="", remove_duplicate=True):
        if self is language_model and memo is None:
            walks.append(self)
        return plain(self, memo, prefix, remove_duplicate)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    predict(posterior, {"input_ids": IDS}, draws)
    assert len(walks) <= 2


def test_precision_travels_with_the_draws(language_model):
    posterior = Gaussian(language_model, last_of_ids)
    batch = {"input_ids": IDS}
    for count in (0, 3):
        plain = posterior.logits(batch, Draws(count))
        narrow = posterior.logits(batch, Draws(count, bf16=True))
        assert narrow.dtype is torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(posterior.logits(batch, Draws(count)), narrow)
        torch.testing.assert_close(narrow.float(), plain, rtol=0.1, atol=0.1)


def test_another_scorer_asks_the_same_posterior(language_model):
    posterior = Gaussian(language_model, last_of_ids)
    twice = posterior.on(lambda model, batch: 2 * last_of_ids(model, batch))
    batch = {"input_ids": IDS}
    torch.testing.assert_close(
        twice.logits(batch, Draws(2)), 2 * posterior.logits(batch, Draws(2)), rtol=1e-5, atol=1e-5
    )
    assert isinstance(Point(language_model, last_of_ids).on(last_of_ids), Point)
