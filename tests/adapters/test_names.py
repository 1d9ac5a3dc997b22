"""Any adapter name works everywhere, and several adapters do not get in each other's way."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from bayestune.adapters import GaussianLinear, Slots, bayesify, group_rows
from bayestune.forward import Draws
from bayestune.kl import KLStep
from bayestune.posteriors import (
    Gaussian,
    Mixture,
    Point,
    export_draw,
    load_adapter,
    load_posterior,
    save_posterior,
)
from tiny import tiny_bert, tiny_llama

IDS = torch.arange(3, 27).reshape(2, 12)
BATCH = {"input_ids": IDS}


def last(model: nn.Module, batch) -> torch.Tensor:
    return model(input_ids=batch["input_ids"]).logits[:, -1, :5]


def config() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def randomise(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def named() -> PeftModel:
    """A model whose only adapter is called "mine"."""
    torch.manual_seed(1)
    return randomise(get_peft_model(tiny_llama(), config(), adapter_name="mine"))


@pytest.fixture
def two() -> PeftModel:
    """A model with the adapters "default" and "b", of which "default" is active."""
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), config())
    model.add_adapter("b", config())
    return randomise(model)


def test_the_active_adapter_is_taken_unless_one_is_named(named, two):
    assert Slots(named).adapter == "mine"
    assert Slots(two).adapter == "default"
    assert Slots(two, "b").adapter == "b"
    two.base_model.set_adapter(["default", "b"])
    with pytest.raises(
        ValueError, match=r"got the active adapters \['default', 'b'\], expected one"
    ):
        Slots(two)


def test_an_adapter_of_any_name_is_converted_trained_saved_and_exported(named, tmp_path):
    assert bayesify(named, init_root_std=0.4) == 4
    optimizer = torch.optim.SGD(named.parameters(), 0.1)
    KLStep(period=1, kl_lr=1e-3).attach(named, optimizer, total_steps=2)
    named.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    posterior = Gaussian(named.eval(), last)
    expected = posterior.logits(BATCH, Draws(2))
    loaded = load_posterior(tiny_llama(), save_posterior(named, tmp_path / "saved"), last)
    assert torch.equal(loaded.logits(BATCH, Draws(2)), expected)
    plain = load_adapter(tiny_llama(), export_draw(posterior, 1, tmp_path / "draw"), last)
    torch.testing.assert_close(plain.logits(BATCH, Draws(0))[0], expected[1], rtol=1e-5, atol=1e-5)


def test_a_second_adapter_trains_under_a_kl_step_of_its_own(two):
    bayesify(two)
    bayesify(two, adapter="b")
    before = copy.deepcopy({n: p for n, p in two.named_parameters() if "root_std" in n})
    two.set_adapter("b")
    optimizer = torch.optim.SGD([p for p in two.parameters() if p.requires_grad], 0.1)
    KLStep(period=1, adapter="b").attach(two, optimizer, total_steps=2)
    two.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = {
        n for n, p in two.named_parameters() if "root_std" in n and not torch.equal(p, before[n])
    }
    assert moved
    assert all(name.endswith(".b.root_std") for name in moved)


def test_kl_step_names_an_adapter_that_is_not_gaussian(two):
    bayesify(two)
    optimizer = torch.optim.SGD(two.parameters(), 0.1)
    with pytest.raises(ValueError, match="got the deterministic adapter 'b'; call bayesify"):
        KLStep(period=1, adapter="b").attach(two, optimizer, total_steps=2)


# Exports of models with several adapters


def test_a_draw_of_a_second_adapter_is_exported_as_that_adapter(two, tmp_path):
    bayesify(two, init_root_std=0.5, adapter="b")
    two.set_adapter("b")
    posterior = Gaussian(two, last)
    expected = posterior.logits(BATCH, Draws(2))[1]
    for i, folder in enumerate(
        (
            export_draw(posterior, 1, tmp_path / "number"),
            export_draw(posterior, posterior.draw(1), tmp_path / "weights"),
        )
    ):
        plain = load_adapter(tiny_llama(), folder, last)
        found = plain.logits(BATCH, Draws(0))[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=f"export {i}")
    with pytest.raises(ValueError, match=r"got a model with the adapters \['default', 'b'\]"):
        export_draw(two, posterior.draw(1), tmp_path / "unclear")


def test_a_member_with_a_head_of_its_own_is_exported_with_it(tmp_path):
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(tiny_bert(), lora)
    model.add_adapter("b", lora)
    randomise(model)
    for slots in (Slots(model), Slots(model, "b")):
        for head in slots.heads.values():
            nn.init.normal_(head.weight, std=0.3)

    def classify(model, batch):
        return model(input_ids=batch["input_ids"]).logits

    mixture = Mixture([Point(model, classify), Point(model, classify, adapter="b")])
    expected = mixture.logits(BATCH, Draws(2))[1]
    plain = load_adapter(tiny_bert(), export_draw(mixture, 1, tmp_path / "draw"), classify)
    torch.testing.assert_close(plain.logits(BATCH, Draws(0))[0], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="which adapter the draw belongs to is not clear"):
        export_draw(mixture, mixture.draw(1), tmp_path / "unclear")


# Rows of several sequences


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS[:1].repeat(4, 1)).logits[:, -1]


def test_sequences_of_a_row_share_a_draw_in_every_adapter_for_one_pass(two):
    bayesify(two, init_root_std=0.5)
    bayesify(two, init_root_std=0.5, adapter="b")
    two.base_model.set_adapter(["default", "b"])
    two.train()
    group_rows(two, 2)
    first, second, third, fourth = outputs(two)
    assert torch.equal(first, second)
    assert torch.equal(third, fourth)
    assert not torch.allclose(second, third)
    first, second, *_ = outputs(two)  # a plain pass again
    assert not torch.allclose(first, second)


def test_a_checkpoints_recomputation_finds_the_groups_of_its_pass(two):
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(two)
        torch.manual_seed(3)
        bayesify(model, init_root_std=0.5)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        group_rows(model, 2)
        torch.manual_seed(4)
        model(input_ids=IDS, labels=IDS).loss.backward()
        layers = Slots(model).of_kind(GaussianLinear)
        gradients.append([layer.root_std.grad for layer in layers.values()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-6)
