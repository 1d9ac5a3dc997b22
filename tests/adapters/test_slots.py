"""Slots are found and named, hold draws for a time, and are refused where A is not applied once."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

from bayestune.adapters import DrawnLinear, GaussianLinear, Slots, bayesify, drawn
from tiny import BATCH, CLOSE, adapted, converted, end_logits, tiny_bert, tiny_llama, with_second

PATHS = [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qv"]


@pytest.fixture
def model() -> nn.Module:
    return converted(tiny_llama())


@pytest.fixture
def two() -> nn.Module:
    """A model with the adapters "default" and "b", of which "default" is active."""
    return with_second(adapted(tiny_llama()), r=4, target_modules=["q_proj"])


# Names


def test_a_slot_is_named_by_its_path_in_the_base_with_and_without_pefts_wrapper(model):
    names = [f"{path}.lora_A" for path in PATHS]
    assert Slots(model).names() == names
    assert Slots(model.get_base_model()).names() == names
    assert list(Slots(model).of_kind(GaussianLinear)) == names
    assert Slots(model).names(("lora_B",), ("v_proj",)) == [
        f"{PATHS[1]}.lora_B",
        f"{PATHS[3]}.lora_B",
    ]
    shapes = Slots(model).shapes()
    assert len(shapes) == 8
    assert shapes[f"{PATHS[0]}.lora_A"] == (8, 32)
    assert shapes[f"{PATHS[0]}.lora_B"] == (32, 8)


def test_the_active_adapter_is_taken_unless_one_is_named(two):
    assert Slots(adapted(tiny_llama(), "mine")).adapter == "mine"
    assert Slots(tiny_llama()).adapter == "default"
    assert Slots(two).adapter == "default"
    assert Slots(two, "b").names() == [f"{path}.lora_A" for path in PATHS[::2]]
    two.base_model.set_adapter(["default", "b"])
    assert Slots(two, "b").adapter == "b"
    with pytest.raises(ValueError, match=r"active adapters \['default', 'b'\], expected one"):
        Slots(two)


def test_a_head_that_is_trained_whole_is_the_adapters_own():
    model = with_second(adapted(tiny_bert(), task_type="SEQ_CLS", target_modules=["query"]))
    heads = [Slots(model, adapter).heads["classifier"] for adapter in ("default", "b")]
    assert heads[0] is not heads[1]
    assert Slots(model).names() == [
        f"bert.encoder.layer.{i}.attention.self.query.lora_A" for i in (0, 1)
    ]


# Draws in slots


def zeros(slots: Slots, side: str = "lora_A", draws: int = 2) -> dict[str, torch.Tensor]:
    shapes = slots.shapes()
    return {name: torch.zeros(draws, *shapes[name]) for name in slots.names((side,))}


def logits(model: nn.Module, times: int = 1) -> torch.Tensor:
    with torch.no_grad():
        return end_logits(model, {"input_ids": BATCH["input_ids"].repeat(times, 1)})


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_held_draws_are_what_the_model_computes_with(model, side):
    slots = Slots(model)
    with model.disable_adapter():
        base = logits(model, 2)
    with slots.holding(zeros(slots, side)):
        assert len(slots.of_kind(DrawnLinear)) == 4
        assert_close(logits(model, 2), base, **CLOSE)
    assert not torch.allclose(logits(model, 2), base, atol=1e-3)


def test_slots_are_put_back_also_after_an_error(model):
    before = Slots(model).modules()

    def fail() -> None:
        with drawn(model, zeros(Slots(model))):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert Slots(model).modules() == before


def test_draws_may_be_held_inside_held_draws(model):
    slots = Slots(model)
    mean = slots.weights()
    stacks = {name: weight[None] for name, weight in mean.items()}
    plain = logits(model)
    with model.disable_adapter():
        base = logits(model)
    with slots.holding(zeros(slots, draws=1)):
        with slots.holding(stacks):
            assert_close(logits(model), plain, **CLOSE)
        assert_close(logits(model), base, **CLOSE)
    assert torch.equal(logits(model), plain)


def test_draws_for_slots_that_the_model_does_not_have_are_refused(model):
    unknown = {"nowhere.lora_A": torch.zeros(1, 8, 32)}
    with (
        pytest.raises(ValueError, match=r"got \['nowhere.lora_A'\], expected slots of the adapter"),
        drawn(model, {**zeros(Slots(model)), **unknown}),
    ):
        pass
    assert not Slots(model).of_kind(DrawnLinear)


# Refusals


class Net(nn.Module):
    """A custom model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def of_one(layer: nn.Module) -> nn.Module:
    return get_peft_model(Net(layer), LoraConfig(target_modules=["layer"]))


def with_another_layer() -> nn.Module:
    class Other(nn.Linear):
        pass

    model = adapted(tiny_llama())
    Slots(model).put({f"{PATHS[0]}.lora_A": Other(32, 8, bias=False)})
    return model


def adapted_llama(**config: object) -> nn.Module:
    return adapted(tiny_llama(), **config)


REFUSED = {
    "no adapter": (tiny_llama, "holds the adapter 'default': got a LlamaForCausalLM"),
    "converted": (
        lambda: converted(tiny_llama()),
        "4 of 4 LoRA layers cannot.*\n.*q_proj: it has been converted already",
    ),
    "DoRA": (
        lambda: adapted_llama(use_dora=True),
        "self_attn.q_proj: its variant DoraLinearVariant does not apply A once",
    ),
    "embedding": (
        lambda: adapted_llama(target_modules=["q_proj", "embed_tokens"]),
        "1 of 3 .*none was converted.*\n  model.embed_tokens: it adapts an embedding",
    ),
    "parameter": (
        lambda: adapted_llama(target_modules=[], target_parameters=["q_proj.weight"]),
        r"it adapts a bare parameter \(target_parameters\)",
    ),
    "another layer": (with_another_layer, "its lora_A is a Other, not a plain Linear"),
    "convolution": (lambda: of_one(nn.Conv2d(3, 4, 3)), "layer: it adapts a convolution"),
    "attention": (lambda: of_one(nn.MultiheadAttention(8, 2)), "nn.MultiheadAttention merges A"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_made_stochastic_is_refused_by_name_and_left_alone(name):
    make, reason = REFUSED[name]
    model = make()
    before = list(model.modules())
    with pytest.raises(ValueError, match=reason):
        bayesify(model)
    assert list(model.modules()) == before


def test_adapters_and_slots_that_the_model_does_not_have_are_refused(two):
    with pytest.raises(ValueError, match="no LoRA layer holds the adapter 'other'"):
        bayesify(two, adapter="other")
    with pytest.raises(ValueError, match="no LoRA layer holds the adapter 'default'"):
        bayesify(two, slots=[])
    with pytest.raises(ValueError, match=r"no such LoRA layer: got \['nowhere'\], expected paths"):
        bayesify(two, slots=["nowhere.lora_A"])
