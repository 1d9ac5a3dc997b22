"""The contract with PEFT, and every refusal by name."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from bayestune.adapters import GaussianLinear, Lora, Slots, attach, bayesify, drawn, evaluating
from bayestune.adapters.lora import head_is_tied

IDS = torch.arange(3, 27).reshape(2, 12)


def adapted(base: nn.Module, **config: object) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(
        base,
        LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_every_layer_is_converted_counted_and_named_by_its_path_in_the_base(llama):
    model = adapted(llama())
    assert bayesify(model) == 4
    assert list(Slots(model).of_kind(GaussianLinear)) == [
        f"model.layers.{i}.self_attn.{p}_proj.lora_A" for i in (0, 1) for p in "qv"
    ]


def test_the_mean_is_the_lora_model_and_training_is_not(llama):
    model = adapted(llama()).eval()
    before = logits(model)
    bayesify(model, init_root_std=0.5)
    assert torch.equal(logits(model), before)
    model.train()
    first, second = logits(model), logits(model)
    assert not torch.allclose(first, before)
    assert not torch.allclose(first, second)


def test_merging_unmerging_and_disabling_see_the_mean_and_the_base(llama):
    base = llama().eval()
    plain = logits(base)
    model = adapted(base).eval()
    bayesify(model, init_root_std=0.5)
    mean = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model.train()), plain)
    model.eval().merge_adapter()
    torch.testing.assert_close(logits(model.train()), mean, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model.eval()), mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), mean, atol=1e-5, rtol=1e-5)


def test_unloading_gives_the_base_back_bit_for_bit(llama):
    base = llama().eval()
    before = copy.deepcopy(base.state_dict())
    model = adapted(base)
    bayesify(model)
    after = model.unload().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_placebo_the_noise_reaches_the_output(llama):
    model = adapted(llama())
    bayesify(model, init_root_std=0.5)
    model.train()
    assert torch.stack([logits(model) for _ in range(8)]).var(0).min() > 0


def test_gradient_checkpointing_gives_the_same_gradients(llama):
    grads = []
    for checkpointing in (False, True):
        model = adapted(llama())
        torch.manual_seed(3)
        bayesify(model, init_root_std=0.5)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(4)
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert any("root_std" in name for name in grads[0])
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_a_bfloat16_base_under_autocast_trains(llama):
    model = adapted(llama().to(torch.bfloat16))
    bayesify(model)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(
        layer.root_std.grad.isfinite().all()
        for layer in Slots(model).of_kind(GaussianLinear).values()
    )


def test_a_second_adapter_and_a_deep_copy_are_their_own(llama):
    model = adapted(llama())
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    assert bayesify(model) == 4
    assert bayesify(model, adapter="other") == 2
    twin = copy.deepcopy(model)
    first, second = (next(iter(Slots(m).of_kind(GaussianLinear).values())) for m in (model, twin))
    assert first.groups is not second.groups
    assert all(
        layer.groups is second.groups for layer in Slots(twin).of_kind(GaussianLinear).values()
    )


def test_drawn_puts_the_slots_back_also_after_an_error(llama):
    model = adapted(llama())
    bayesify(model)
    before = dict(Slots(model).of_kind(GaussianLinear))
    stack = {path: torch.zeros(2, *layer.weight.shape) for path, layer in before.items()}

    def fail() -> None:
        with drawn(model, stack):
            assert not Slots(model).of_kind(GaussianLinear)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert Slots(model).of_kind(GaussianLinear) == before


def test_drawn_refuses_layers_the_model_has_not(llama):
    model = adapted(llama())
    with (
        pytest.raises(
            ValueError, match=r"got \['nowhere'\], expected slots of the adapter 'default'"
        ),
        drawn(model, {"nowhere": torch.zeros(1, 8, 32)}),
    ):
        pass


def test_evaluating_restores_every_modules_mode(llama):
    model = adapted(llama()).train()
    model.base_model.model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before


# Refusals


def test_no_match(llama):
    with pytest.raises(
        ValueError, match="no LoRA layer holds the adapter 'default': got a LlamaForCausalLM"
    ):
        bayesify(llama())
    with pytest.raises(ValueError, match="no LoRA layer holds the adapter 'other'"):
        bayesify(adapted(llama()), adapter="other")


def test_twice(llama):
    model = adapted(llama())
    bayesify(model)
    with pytest.raises(
        ValueError, match="4 of 4 LoRA layers cannot.*\n.*q_proj: it has been converted already"
    ):
        bayesify(model)


def test_dora(llama):
    with pytest.raises(ValueError, match="self_attn.q_proj: its variant DoraLinearVariant"):
        bayesify(adapted(llama(), use_dora=True))


def test_embeddings_and_nothing_is_converted(llama):
    model = adapted(llama(), target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(
        ValueError,
        match="1 of 3 .*none was converted.*\n  model.embed_tokens: it adapts an embedding",
    ):
        bayesify(model)
    assert not any(isinstance(module, GaussianLinear) for module in model.modules())


def test_target_parameters(llama):
    model = adapted(llama(), target_modules=[], target_parameters=["q_proj.weight"])
    with pytest.raises(ValueError, match="it adapts a bare parameter \\(target_parameters\\)"):
        bayesify(model)


def test_a_slot_that_is_no_plain_linear(llama):
    model = adapted(llama())

    class Other(nn.Linear):
        pass

    next(iter(Slots(model).layers.values())).lora_A["default"] = Other(32, 8, bias=False)
    with pytest.raises(ValueError, match="its lora_A is a Other, not a plain Linear"):
        bayesify(model)


def test_a_convolution():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

    model = get_peft_model(Net(), LoraConfig(target_modules=["conv"]))
    with pytest.raises(ValueError, match="conv: its lora_A is a Conv2d, not a plain Linear"):
        bayesify(model)


def test_multihead_attention():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    model = get_peft_model(Net(), LoraConfig(target_modules=["attention"]))
    with pytest.raises(ValueError, match="nn.MultiheadAttention merges A into the weight"):
        bayesify(model)


# attach


def test_the_papers_targets_include_the_head_only_where_it_is_not_tied(llama):
    assert "lm_head" in Slots(attach(llama(), Lora())).layers
    tied = llama(tie_word_embeddings=True)
    assert head_is_tied(tied)
    assert "lm_head" not in Slots(attach(tied, Lora())).layers


def test_an_adapter_on_a_tied_head_works_and_leaves_the_embedding_alone(llama):
    base = llama(tie_word_embeddings=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(base, target_modules=["lm_head"]).eval()
    with model.disable_adapter():
        plain = logits(model)
    assert bayesify(model, init_root_std=0.5) == 1
    assert not torch.allclose(logits(model), plain)
    hidden = model.base_model.model.model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(hidden, base.model(input_ids=IDS).last_hidden_state)
    assert torch.stack([logits(model.train()) for _ in range(4)]).var(0).max() > 0


def test_attach_refuses_targets_that_no_module_has_and_a_second_adapter(llama):
    with pytest.raises(
        ValueError, match=r"got targets \['query'\], expected names among .*'q_proj'"
    ):
        attach(llama(), Lora(targets=("query",)))
    with pytest.raises(ValueError, match="has an adapter already"):
        attach(attach(llama(), Lora()), Lora())


def test_other_architectures_convert_too():
    model = get_peft_model(
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)),
        LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True),
    )
    assert bayesify(model, init_root_std=0.5) == 2
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(
        layer.root_std.grad is not None for layer in Slots(model).of_kind(GaussianLinear).values()
    )
