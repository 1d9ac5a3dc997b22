"""LoRA is attached with the paper's settings and detached without a trace; contexts restore."""

import copy

import pytest
import torch
from torch import nn

from bayestune.adapters import (
    Lora,
    Slots,
    active,
    attach,
    base_of,
    detach,
    evaluating,
    is_classifier,
    output_head,
)
from bayestune.adapters.lora import head_is_tied
from tiny import adapted, tiny_bert, tiny_llama, with_second


def leaves(model: nn.Module) -> set[str]:
    """The last names of the layers that are adapted."""
    return {path.rpartition(".")[2] for path in Slots(model).layers}


def test_the_papers_targets_include_the_head_only_where_it_is_not_tied():
    tied = tiny_llama(tie_word_embeddings=True)
    assert head_is_tied(tied)
    assert leaves(attach(tied, Lora())) == {"q_proj", "v_proj"}
    assert leaves(attach(tiny_llama(), Lora())) == {"q_proj", "v_proj", "lm_head"}
    assert leaves(attach(tiny_bert(), Lora())) == {"query", "value"}


def test_the_settings_are_pefts():
    model = attach(tiny_llama(), Lora(rank=3, alpha=9, dropout=0.2, targets=("o_proj",)))
    layer = next(iter(Slots(model).layers.values()))
    assert leaves(model) == {"o_proj"}
    assert Slots(model).shapes()["model.layers.0.self_attn.o_proj.lora_A"] == (3, 32)
    assert layer.scaling == {"default": 3.0}
    assert layer.lora_dropout["default"].p == 0.2
    assert model.peft_config["default"].task_type == "CAUSAL_LM"
    assert attach(tiny_bert(), Lora()).peft_config["default"].task_type == "SEQ_CLS"


def test_targets_that_no_module_has_and_a_second_adapter_are_refused():
    with pytest.raises(ValueError, match=r"got targets \['query'\], expected names among .*q_proj"):
        attach(tiny_llama(), Lora(targets=("query",)))
    with pytest.raises(ValueError, match=r"an adapter already: .*unload\(\).* or load the base"):
        attach(attach(tiny_llama(), Lora()), Lora())


def test_a_models_kind_is_seen_through_its_wrapper():
    base = tiny_llama()
    model = attach(base, Lora())
    assert base_of(model) is base_of(base) is base
    assert output_head(model) is base.lm_head
    assert output_head(nn.Linear(2, 2)) is None
    assert is_classifier(tiny_bert())
    assert not is_classifier(base)


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_detaching_gives_the_base_back_bit_for_bit_also_its_head(make):
    base = make()
    before = copy.deepcopy(base.state_dict())
    model = attach(base, Lora())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    after = detach(model).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# Contexts


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.fixture
def model() -> nn.Module:
    """A model in training mode, but for one of its layers."""
    model = adapted(tiny_llama()).train()
    model.get_base_model().model.layers[1].eval()
    return model


def test_evaluating_restores_every_modules_mode_also_nested(model):
    before = modes(model)
    with evaluating(model):
        with evaluating(model):
            assert not any(modes(model))
        assert not any(modes(model))
        assert not torch.is_grad_enabled()
    assert modes(model) == before
    assert torch.is_grad_enabled()


def test_evaluating_restores_what_is_switched_inside_and_after_an_error(model):
    before = modes(model)

    def fail() -> None:
        with evaluating(model):
            model.train()
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert modes(model) == before
    assert torch.is_grad_enabled()


def test_an_adapter_is_active_for_a_time_and_what_is_trainable_is_restored(model):
    with_second(model)
    next(iter(Slots(model).modules().values())).requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]

    def fail() -> None:
        with active(model, "b"):
            assert model.active_adapter == "b"
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert model.active_adapter == "default"
    assert [parameter.requires_grad for parameter in model.parameters()] == before
