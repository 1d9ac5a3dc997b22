"""Quantised bases: how they are told apart, and what a Gaussian adapter over one promises.

The layers here stand in for bitsandbytes': int8 weights and their scales, products in bfloat16, and
rounding that depends on nothing but the row. The real ones: tests/stacks/test_quantised.py.
"""

import logging
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close

from bayestune import Gaussian, bayesify, export_draw, load_posterior, save_posterior
from bayestune.adapters import Lora, attach, num_quantised, precision_of
from bayestune.forward import Draws
from bayestune.models import LoadedModel
from bayestune.session.opened_model import dtype_of
from tiny import BATCH, byte_level_tokenizer, end_logits, one_by_one, randomised, tiny_llama


class Linear8bitLt(nn.Linear):
    """A linear layer in int8, with a scale for each output."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        few = (plain.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(few, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        whole = (self.weight * self.scale).to(torch.bfloat16)
        return nn.functional.linear(x.to(torch.bfloat16), whole).to(x.dtype)


def quantised():
    """A tiny Llama whose layers but the head are in int8."""
    model = tiny_llama()
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != "lm_head":
            model.set_submodule(path, Linear8bitLt(module))
    model.is_quantized = True
    model.hf_quantizer = SimpleNamespace(pre_quantized=False)
    return model.eval()


def gaussian():
    model = randomised(attach(quantised(), Lora(targets=("q_proj", "v_proj"))))
    bayesify(model, init_root_std=0.5)
    return Gaussian(model, end_logits)


@pytest.mark.parametrize(
    ("make", "precision"),
    [
        (tiny_llama, "float32"),
        (lambda: tiny_llama().bfloat16(), "bfloat16"),
        (lambda: attach(tiny_llama().bfloat16(), Lora()), "bfloat16"),
        (quantised, "8bit"),
        (lambda: gaussian().model, "8bit"),
    ],
)
def test_a_bases_precision_is_told_with_and_without_an_adapter(make, precision):
    assert precision_of(make()) == precision


def test_another_packages_method_is_told_by_its_name():
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "gptq"}
    assert precision_of(model) == "gptq"


def test_embeddings_and_heads_do_not_count_as_left_out():
    model = quantised()
    done, rest = num_quantised(model)
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    inside = sum(p.numel() for p in model.parameters() if p.dtype is torch.int8)
    assert (done, rest) == (inside, norms)


def test_adapters_are_float32_and_their_gradients_reach_all_of_them():
    model = gaussian().model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    model.train()(**BATCH).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    assert len(trained) == 2 * 2 * 3


def test_gradients_go_through_reentrant_checkpoints():
    """Their inputs need gradients, which PEFT asks for over float bases alone."""
    found = []
    for reentrant in (None, True, False):
        model = gaussian().model.train()
        if reentrant is not None:
            kwargs = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        torch.manual_seed(3)
        model(**BATCH).logits.square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)
    assert_close(found[2], found[0], rtol=1e-3, atol=1e-6)


def test_draws_share_a_pass_are_saved_and_exported(tmp_path):
    posterior = gaussian()
    logits = posterior.logits(BATCH, Draws(4))
    assert logits.std(0).max() > 0.01
    assert_close(logits, one_by_one(posterior, BATCH, Draws(4)), rtol=1e-2, atol=1e-2)
    loaded = load_posterior(quantised(), save_posterior(posterior, tmp_path / "a"), end_logits)
    assert torch.equal(loaded.logits(BATCH, Draws(4)), logits)
    plain = PeftModel.from_pretrained(quantised(), export_draw(posterior, 1, tmp_path / "b"))
    with torch.no_grad():
        assert_close(end_logits(plain.eval(), BATCH), logits[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("other", "said"),
    [(tiny_llama, "float32"), (lambda: tiny_llama().bfloat16(), "bfloat16"), (quantised, None)],
)
def test_another_precision_than_the_fits_is_said(other, said, tmp_path, caplog):
    folder = save_posterior(gaussian(), tmp_path)
    caplog.clear()
    load_posterior(other(), folder, end_logits)
    if said is None:
        assert "fitted over a base" not in caplog.text
    else:
        assert f"was fitted over a base in 8bit and is used over one in {said}" in caplog.text
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_a_model_is_opened_again_as_it_was_made():
    assert dtype_of(quantised()) == "8bit"
    kept = quantised()
    kept.hf_quantizer.pre_quantized = True  # on the disk too
    assert dtype_of(kept) == "float32"
    assert dtype_of(tiny_llama().bfloat16()) == "bfloat16"


def test_a_model_beside_it_shares_what_layers_keep_apart_from_parameters():
    MatmulLtState = type("MatmulLtState", (), {})  # noqa: N806
    loaded = LoadedModel(quantised(), byte_level_tokenizer(), "tiny")
    layer = loaded.model.model.layers[0].mlp.up_proj
    layer.state = MatmulLtState()
    layer.state.CB = layer.weight.data
    for shared in (True, False):
        twin = loaded.again(shared=shared).model.model.layers[0].mlp.up_proj
        assert (twin.state.CB.data_ptr() == layer.state.CB.data_ptr()) is shared
        assert (twin.weight.data_ptr() == layer.weight.data_ptr()) is shared
