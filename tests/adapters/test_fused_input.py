"""Layers that receive one tensor are one product; each has the law it has alone."""

import copy
import math
import weakref
from collections.abc import Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import linear
from torch.testing import assert_close

from bayestune.adapters import GaussianLinear, RowGroups, Slots, bayesify
from bayestune.adapters import fused_input as module
from tiny import BATCH, CLOSE, converted, row_weights, tiny_llama, with_second

QUERY = "block.q_proj"
VALUE = "block.v_proj"


def pair(names: Sequence[str] = (QUERY, VALUE), noise: str = "row") -> list[GaussianLinear]:
    """The Gaussian A of two layers, of ranks 3 and 2, in the order of their names."""
    torch.manual_seed(5)
    base = nn.Module()
    for name in names:
        block, _, leaf = name.partition(".")
        if not hasattr(base, block):
            base.add_module(block, nn.Module())
        base.get_submodule(block).add_module(leaf, nn.Linear(6, 4))
    lora = LoraConfig(r=3, rank_pattern={names[1]: 2}, target_modules=list(names))
    model = get_peft_model(base, lora)
    bayesify(model, init_root_std=0.7, noise=noise)
    layers = Slots(model).of_kind(GaussianLinear)
    return [layers[f"{name}.lora_A"].train() for name in names]


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


@pytest.mark.parametrize(("dropout", "ranks"), [(0.0, [16, 8]), (0.1, [8, 8, 8])])
def test_in_a_model_queries_and_values_are_one_product_unless_dropout_gives_each_its_own(
    dropout, ranks, products
):
    targets = ["q_proj", "v_proj", "down_proj"]
    model = converted(tiny_llama(), target_modules=targets, lora_dropout=dropout).train()
    for _ in range(2):
        model(**BATCH).logits.sum().backward()
    assert products == ranks * 4
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
