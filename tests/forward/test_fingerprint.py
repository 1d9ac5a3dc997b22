"""A fingerprint notices every change of weights and adapters, traced by torch or not."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from bayestune.adapters import Slots
from bayestune.forward.fingerprint import Fingerprint
from tiny import BATCH, converted, tiny_llama


@pytest.fixture
def model() -> nn.Module:
    model = converted(tiny_llama())
    norm_of_block(model).weight.requires_grad_(True)
    return model


def first(model: nn.Module, side: str = "lora_B") -> nn.Module:
    return next(slot for name, slot in Slots(model).modules().items() if name.endswith(side))


def inner(model: nn.Module) -> nn.Module:
    return model.get_base_model().model


def norm_of_block(model: nn.Module) -> nn.Module:
    """A layer of the base that is trained beside the adapter."""
    return inner(model).layers[0].input_layernorm


def fused_step(model: nn.Module) -> None:
    """A step that leaves no trace in the tensors' versions."""
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    versions = [parameter._version for parameter in chosen]
    for parameter in chosen:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(chosen, lr=0.1, fused=True).step()
    assert [parameter._version for parameter in chosen] == versions


def transposed(model: nn.Module) -> None:
    layer = inner(model).layers[0].self_attn.o_proj
    layer.kept = [layer.weight]
    layer.weight = nn.Parameter(layer.weight.detach().t(), requires_grad=False)


def reshaped(model: nn.Module) -> None:
    slot = first(model)
    slot.weight = nn.Parameter(slot.weight.detach().reshape(16, -1))


CHANGES = {
    "fused step": fused_step,
    "data of the adapter": lambda model: first(model).weight.data.neg_(),
    "data of the deviation": lambda model: first(model, "lora_A").root_std.data.neg_(),
    "data of a trained weight": lambda model: norm_of_block(model).weight.data.neg_(),
    "swapped": lambda model: first(model).weight.data.copy_(first(model).weight.data.flip(0)),
    "reshaped": reshaped,
    "a frozen weight": lambda model: inner(model).norm.weight.neg_(),
    "a frozen weight, transposed": transposed,
    "a buffer": lambda model: inner(model).rotary_emb.inv_freq.neg_(),
    "another adapter": lambda model: model.add_adapter("b", LoraConfig(target_modules=["q_proj"])),
    "half": lambda model: model.half(),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "scaled": lambda model: inner(model).layers[0].self_attn.q_proj.scale_layer(2.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(model, name):
    fingerprint = Fingerprint(model)
    assert fingerprint.matches(model)
    with torch.no_grad():
        CHANGES[name](model)
    assert not fingerprint.matches(model)
    assert Fingerprint(model).matches(model)


def test_passes_and_modes_are_no_change(model):
    fingerprint = Fingerprint(model)
    model.train()(**BATCH).logits.sum().backward()
    model.eval()
    assert fingerprint.matches(model)


def test_weights_that_count_no_versions_are_never_trusted(model):
    with torch.inference_mode():
        inner(model).norm.weight = nn.Parameter(torch.ones(32), requires_grad=False)
    assert not Fingerprint(model).matches(model)
