"""Layers that receive one tensor are one product; each has the law it has alone."""

import copy
import math
import weakref
from collections.abc import Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import dropout, linear
from torch.testing import assert_close

from bayestune.adapters import GaussianLinear, RowGroups, Slots, bayesify
from bayestune.adapters import fused_input as module
from tiny import BATCH, CLOSE, converted, row_weights, tiny_llama, with_second

QUERY = "block.q_proj"
VALUE = "block.v_proj"


def owners(
    names: Sequence[str] = (QUERY, VALUE),
    noise: str = "row",
    dtype: torch.dtype = torch.float32,
    lora_dropout: float = 0.0,
) -> list[nn.Module]:
    """Two LoRA layers with Gaussian A of ranks 3 and 2, in the order of their names."""
    torch.manual_seed(5)
    base = nn.Module()
    for name in names:
        block, _, leaf = name.partition(".")
        if not hasattr(base, block):
            base.add_module(block, nn.Module())
        base.get_submodule(block).add_module(leaf, nn.Linear(6, 4))
    ranks = {"r": 3, "rank_pattern": {names[1]: 2}}
    lora = LoraConfig(**ranks, target_modules=list(names), lora_dropout=lora_dropout)
    model = get_peft_model(base.to(dtype), lora)
    bayesify(model, init_root_std=0.7, noise=noise)
    return [model.train().base_model.model.get_submodule(name) for name in names]


def pair(names: Sequence[str] = (QUERY, VALUE), noise: str = "row") -> list[GaussianLinear]:
    """The Gaussian A of the two layers."""
    return [owner.lora_A["default"] for owner in owners(names, noise)]


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """The ranks of each product of rows and their draws that is made."""
    ranks = []
    apply = module.RowNoise.apply

    def count(input: torch.Tensor, mean: torch.Tensor, *rest: object) -> torch.Tensor:
        ranks.append(len(mean))
        return apply(input, mean, *rest)

    monkeypatch.setattr(module.RowNoise, "apply", count)
    return ranks


@pytest.fixture
def shared_draws(monkeypatch) -> list[int]:
    """The ranks of the draws that layers with inputs of their own share."""
    ranks = []
    apply = module.RowDraws.apply

    def count(mean: torch.Tensor, *rest: object) -> torch.Tensor:
        ranks.append(len(mean))
        return apply(mean, *rest)

    monkeypatch.setattr(module.RowDraws, "apply", count)
    return ranks


@pytest.mark.parametrize(("bf16", "close"), [(False, CLOSE), (True, {"rtol": 2e-2, "atol": 2e-2})])
def test_outputs_and_gradients_are_those_of_one_stacked_layer(bf16, close, products):
    both = pair()
    x = torch.randn(3, 4, 6, requires_grad=True)
    cotangent = torch.randn(3, 4, 5)

    def gradients(plain: bool) -> list[torch.Tensor]:
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if plain:
                mean = torch.cat([layer.weight for layer in both])
                std = torch.cat([layer.std for layer in both])
                output = torch.bmm(x, row_weights(mean, std, 3).transpose(1, 2))
            else:
                output = torch.cat([layer(x) for layer in both], -1)
        leaves = [x, *both[0].parameters(), *both[1].parameters()]
        return [output, *torch.autograd.grad((output * cotangent).sum(), leaves)]

    assert_close(gradients(plain=False), gradients(plain=True), **close)
    assert products == [5]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("dtype", "lora_dropout"),
    [(torch.bfloat16, 0.0), (torch.float32, 0.2), (torch.bfloat16, 0.2), (torch.float32, 0.0)],
)
def test_copies_that_peft_makes_of_one_tensor_are_the_plain_form(
    dtype, lora_dropout, bf16, products, shared_draws
):
    both = owners(dtype=dtype, lora_dropout=lora_dropout)
    layers = [owner.lora_A["default"] for owner in both]
    x = torch.randn(3, 4, 6).to(dtype).requires_grad_()
    cotangents = [torch.randn(3, 4, 3), torch.randn(3, 4, 2)]
    leaves = [x, *layers[0].parameters(), *layers[1].parameters()]

    def copied() -> torch.Tensor:
        return dropout(x.float(), lora_dropout) if lora_dropout else x.float()

    def plain() -> list[torch.Tensor]:
        first = copied()
        mean = torch.cat([layer.weight for layer in layers])
        draws = row_weights(mean, torch.cat([layer.std for layer in layers]), 3)
        inputs = (first, copied())
        parts = draws.split([3, 2], 1)
        return [torch.bmm(x, one.transpose(1, 2)) for x, one in zip(inputs, parts, strict=True)]

    def ours() -> list[torch.Tensor]:
        outputs = []
        for layer in layers:
            layer.register_forward_hook(lambda _, args, output: outputs.append(output))
        for owner in both:
            owner(x)
        return outputs

    def gradients(form) -> list[torch.Tensor]:
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = form()
        loss = sum((y * c).sum() for y, c in zip(outputs, cotangents, strict=True))
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    rough = bf16 or dtype is torch.bfloat16  # the gradient of x is rounded once, not twice
    close = {"rtol": 2e-2, "atol": 4e-2} if rough else CLOSE
    for one, other in zip(gradients(ours), gradients(plain), strict=True):
        assert_close(one, other, **close)
    assert (products, shared_draws) == (([], [5]) if lora_dropout else ([5], []))


def test_under_dropout_each_layer_has_a_mask_of_its_own():
    both = owners(lora_dropout=0.5)
    x = torch.ones(2, 3, 6)
    masks = []
    for owner in both:
        owner.lora_dropout["default"].register_forward_hook(lambda _, a, y: masks.append(y))
        owner(x)
    assert not torch.equal(*masks)
    assert {float(value) for mask in masks for value in mask.unique()} == {0.0, 2.0}


def test_a_tensor_that_only_looks_like_a_copy_is_computed_for_itself(products):
    first, second = owners(dtype=torch.bfloat16)
    x = torch.randn(2, 3, 6).bfloat16()
    first(x)
    second(x.clone())
    assert products == [5, 5]
    second.lora_A["default"](torch.randn(2, 3, 6))  # outside of its owner
    assert products == [5, 5, 5]


@pytest.mark.parametrize("lora_dropout", [0.0, 0.2])
def test_what_owners_receive_is_not_kept(lora_dropout):
    both = owners(dtype=torch.bfloat16, lora_dropout=lora_dropout)
    for mode in (True, False):
        x = torch.randn(2, 3, 6).bfloat16()
        for owner in both:
            owner.train(mode)
            owner(x)
        kept = weakref.ref(x)
        del x
        assert kept() is None
    both[0].train().enable_adapters(False)
    x = torch.randn(2, 3, 6).bfloat16()
    both[0](x)
    kept = weakref.ref(x)
    del x
    assert kept() is None


@pytest.mark.parametrize(("dtype", "lora_dropout"), [(torch.bfloat16, 0.0), (torch.float32, 0.2)])
def test_recomputation_sees_the_same_draws_and_masks(dtype, lora_dropout):
    targets = ["q_proj", "k_proj", "v_proj"]
    base = tiny_llama().to(dtype)
    model = converted(base, target_modules=targets, lora_dropout=lora_dropout).train()
    found = []
    for recomputed in (False, True):
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        model(**BATCH, use_cache=False).logits.float().square().mean().backward()
        learnt = [one for one in model.parameters() if one.grad is not None]
        found.append([one.grad.clone() for one in learnt])
        model.zero_grad()
    assert_close(found[1], found[0])


def test_each_has_the_law_it_has_alone_and_their_noises_are_independent():
    both = [layer.double() for layer in pair()]
    count = 4000
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        outputs = torch.stack([torch.cat([layer(x) for layer in both], -1) for _ in range(count)])
    mean = torch.cat([linear(x, layer.weight) for layer in both], -1)
    variance = torch.cat([linear(x.square(), layer.std.square()) for layer in both], -1)
    assert ((outputs.mean(0) - mean) / (variance / count).sqrt()).abs().max() < 4.5
    assert (outputs.var(0) / variance - 1).abs().max() < 4.5 * math.sqrt(3 / count)
    noise = (outputs - mean)[:, :, 0]  # of the first token: (passes, rows, ranks)
    first = noise[:, 0, 0]
    for other in (noise[:, 0, 3], noise[:, 1, 3]):
        products = first * other
        assert abs(products.mean()) < 4.5 * products.std() / math.sqrt(count)
    squares = (first * noise[:, 0, 3]).square()  # independent, not merely uncorrelated
    expected = first.var() * noise[:, 0, 3].var()
    assert abs(squares.mean() - expected) < 4.5 * squares.std() / math.sqrt(count)


def test_every_pass_draws_anew_and_keeps_nothing():
    both = pair()
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        passes = [[layer(x) for layer in both] for _ in range(2)]
    for one, other in zip(*passes, strict=True):
        assert not torch.allclose(one, other)
    kept = weakref.ref(x)
    del x
    assert kept() is None


def test_a_layer_that_is_given_another_tensor_computes_anew_and_any_may_be_called_first(products):
    first, second = pair()
    x = torch.randn(2, 3, 6)
    for _ in range(2):
        first(x)
        second(x.clone())
    assert products == [5, 5, 5, 5]
    second(x)
    first(x)
    second(x)
    assert products[4:] == [5, 5]


def test_a_layer_at_its_mean_or_a_replica_is_computed_alone(products):
    first, second = pair()
    x = torch.randn(2, 3, 6)
    second.eval()
    first(x)
    assert torch.equal(second(x), linear(x, second.weight))
    second.train()
    copy.copy(first)(x)
    copy.copy(second)(x)
    assert products == [3, 3, 2]
    first(x)
    second(x)
    assert products[3:] == [5]


def test_sequences_of_a_row_share_their_draw_here_too(products):
    both = pair()
    both[0].passes.ask(RowGroups(2), lasting=True)
    x = torch.randn(1, 3, 6).expand(4, 3, 6)
    for output in [layer(x) for layer in both]:
        assert torch.equal(output[0], output[1])
        assert not torch.allclose(output[1], output[2])
    assert products == [5]


@pytest.mark.parametrize(
    ("names", "noise"),
    [
        (("a.q_proj", "b.v_proj"), "row"),
        (("a.q_proj", "a.o_proj"), "row"),
        (("a.q_proj", "a.up_proj"), "row"),
        ((QUERY, VALUE), "independent"),
        ((QUERY, VALUE), "token"),
    ],
)
def test_only_layers_of_one_block_that_receive_one_tensor_are_fused(names, noise):
    assert all(layer.fused is None for layer in pair(names, noise))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lora_dropout", "made"), [(0.0, ([16, 8], [])), (0.1, ([8], [16]))])
def test_in_a_model_queries_and_values_are_one_product_or_under_dropout_have_one_noise(
    dtype, lora_dropout, made, products, shared_draws
):
    targets = ["q_proj", "v_proj", "down_proj"]
    base = tiny_llama().to(dtype)
    model = converted(base, target_modules=targets, lora_dropout=lora_dropout).train()
    for _ in range(2):
        model(**BATCH).logits.sum().backward()
    assert (products, shared_draws) == (made[0] * 4, made[1] * 4)
    layers = Slots(model).of_kind(GaussianLinear).values()
    assert all(layer.root_std.grad.abs().max() > 0 for layer in layers)


def test_a_second_adapter_is_fused_for_itself(products):
    model = with_second(converted(tiny_llama()), r=3)
    bayesify(model, adapter="b")
    model.base_model.set_adapter(["default", "b"])
    model.train()(**BATCH)
    assert products == [16, 6] * 2
    model.set_adapter("b")
    model(**BATCH)
    assert products[4:] == [6, 6]


def test_a_copy_of_the_model_is_fused_for_itself(products):
    model = converted(tiny_llama()).train()
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    assert twin(**BATCH).logits.isfinite().all()
    assert products == [16, 16]
