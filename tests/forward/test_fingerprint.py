"""A snapshot notices every change of weights and adapters, also those that leave no trace in a tensor's version."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bayestune.adapters import Slots, bayesify
from bayestune.forward import Draws
from bayestune.forward.fingerprint import Fingerprint
from bayestune.posteriors import Gaussian


@pytest.fixture
def model(llama):
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    for slot in Slots(model).modules().values():
        nn.init.normal_(slot.weight, std=0.3)
    bayesify(model, init_root_std=0.5)
    return model


def first(model, side="lora_B"):
    return next(slot for name, slot in Slots(model).modules().items() if name.endswith(side))


def fused_step(model):
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in chosen:
        parameter.grad = torch.ones_like(parameter)
    versions = [parameter._version for parameter in chosen]
    torch.optim.SGD(chosen, lr=0.1, fused=True).step()
    return versions == [parameter._version for parameter in chosen]


def transposed(model):
    layer = model.get_base_model().model.layers[0].self_attn.o_proj
    layer.kept = [layer.weight]
    layer.weight = nn.Parameter(layer.weight.detach().t(), requires_grad=False)


def reshaped(model):
    slot = first(model)
    slot.weight = nn.Parameter(slot.weight.detach().reshape(16, -1))


CHANGES = {
    "fused step": fused_step,
    "data of the adapter": lambda model: first(model).weight.data.neg_(),
    "data of the deviation": lambda model: first(model, "lora_A").root_std.data.neg_(),
    "swapped": lambda model: first(model).weight.data.copy_(first(model).weight.data.flip(0)),
    "reshaped": reshaped,
    "a frozen weight": lambda model: model.get_base_model().model.norm.weight.neg_(),
    "a frozen weight, transposed": transposed,
    "a buffer": lambda model: model.get_base_model().model.rotary_emb.inv_freq.neg_(),
    "another adapter": lambda model: model.add_adapter(
        "other", LoraConfig(target_modules=["q_proj"])
    ),
    "half": lambda model: model.half(),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "scaled": lambda model: first_layer(model).scale_layer(2.0),
}


def first_layer(model):
    return model.get_base_model().model.layers[0].self_attn.q_proj


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(model, name):
    snapshot = Fingerprint(model)
    assert snapshot.matches(model)
    with torch.no_grad():
        CHANGES[name](model)
    assert not snapshot.matches(model)
    assert Fingerprint(model).matches(model)


def test_passes_modes_and_other_devices_of_the_inputs_are_no_change(model):
    snapshot = Fingerprint(model)
    model.train()(input_ids=torch.ones(2, 5, dtype=torch.long)).logits.sum().backward()
    model.eval()
    assert snapshot.matches(model)


def test_weights_that_count_no_versions_are_never_trusted(model):
    with torch.inference_mode():
        model.get_base_model().model.norm.weight = nn.Parameter(torch.ones(32), requires_grad=False)
    assert not Fingerprint(model).matches(model)


def test_a_fused_optimiser_that_leaves_versions_alone_renews_held_draws(model):
    posterior = Gaussian(model, lambda model, batch: model(**batch).logits[:, -1, :5])
    batch = {"input_ids": torch.arange(1, 11).reshape(2, 5)}
    before = posterior.logits(batch, Draws(3))
    assert fused_step(model)
    after = posterior.logits(batch, Draws(3))
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after, Gaussian(model, posterior.scorer).logits(batch, Draws(3)))
