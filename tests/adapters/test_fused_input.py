"""Layers that are given one tensor are computed as one layer of all their ranks, each with the law it has alone."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

from bayestune.adapters import GaussianLinear, RowGroups, Slots, bayesify
from bayestune.adapters import fused_input as module
from bayestune.adapters.fused_input import fuse_inputs
from tiny import row_weights

NAMES = ("block.q_proj.lora_A", "block.v_proj.lora_A")


def pair(ranks=(3, 2), width=6, groups=None, names=NAMES, noise="row"):
    torch.manual_seed(5)
    groups = groups or RowGroups()
    made = {
        n: GaussianLinear(nn.Linear(width, r, bias=False), 0.7, noise, groups)
        for n, r in zip(names, ranks, strict=True)
    }
    owner = SimpleNamespace(
        get_base_layer=lambda: nn.Linear(2, 2), lora_dropout={"default": nn.Identity()}
    )
    layers = {name.removesuffix(".lora_A"): owner for name in made}
    if noise == "row":  # `bayesify` fuses no others
        fuse_inputs(SimpleNamespace(layers=layers, adapter="default"), made)
    return list(made.values())


@pytest.fixture
def applied(monkeypatch):
    """The ranks of each row product that is made."""
    ranks, apply = [], module.RowNoise.apply
    monkeypatch.setattr(
        module.RowNoise, "apply", lambda x, m, g: ranks.append(len(m)) or apply(x, m, g)
    )
    return ranks


@pytest.mark.parametrize("bf16", [False, True])
def test_outputs_and_gradients_are_those_of_one_stacked_layer(bf16, applied):
    both, x = pair(), torch.randn(3, 4, 6, requires_grad=True)
    cotangents = torch.randn(3, 4, 3), torch.randn(3, 4, 2)
    leaves = [x, *(p for layer in both for p in (layer.weight, layer.root_std))]

    def gradients(plain):
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if plain:
                mean, root = (
                    torch.cat([getattr(layer, name) for layer in both])
                    for name in ("weight", "root_std")
                )
                outputs = torch.bmm(x, row_weights(mean, root.square(), 3).transpose(1, 2)).split(
                    (3, 2), -1
                )
            else:
                outputs = [layer(x) for layer in both]
        loss = sum((y * c).sum() for y, c in zip(outputs, cotangents, strict=True))
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    close = {"rtol": 2e-2, "atol": 2e-2} if bf16 else {"rtol": 1e-5, "atol": 1e-5}
    for ours, theirs in zip(gradients(plain=False), gradients(plain=True), strict=True):
        assert_close(ours, theirs, **close)
    assert applied == [5]


def test_each_has_the_law_it_has_alone_and_their_noises_are_independent():
    both, passes = [layer.double() for layer in pair()], 4000
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        samples = [
            torch.stack(values)
            for values in zip(*([layer(x) for layer in both] for _ in range(passes)), strict=True)
        ]
    noises = []
    for layer, found in zip(both, samples, strict=True):
        mean = nn.functional.linear(x, layer.weight)
        variance = nn.functional.linear(x.square(), layer.std.square())
        assert ((found.mean(0) - mean) / (variance / passes).sqrt()).abs().max() < 4.5
        assert (found.var(0) / variance - 1).abs().max() < 4.5 * math.sqrt(3 / passes)
        noises.append((found - mean)[..., 0])  # (passes, rows, tokens)
    for row, other in ((0, 0), (0, 1)):
        products = noises[0][:, row, 0] * noises[1][:, other, 0]
        squares = noises[0][:, row, 0].square() * noises[1][:, other, 0].square()
        error = products.std() / math.sqrt(passes)
        assert abs(products.mean()) < 4.5 * error
        if row == other:  # independent, not merely uncorrelated
            expected = noises[0][:, row, 0].var() * noises[1][:, other, 0].var()
            assert abs(squares.mean() - expected) < 4.5 * squares.std() / math.sqrt(passes)


def test_every_pass_draws_anew_and_nothing_is_kept_behind_one():
    first, second = pair()
    x = torch.randn(2, 3, 6)
    one, other = [first(x), second(x)], [first(x), second(x)]
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert first.fused is second.fused is not None
    assert (first.fused._input, first.fused._ready) == (None, {})


def test_a_layer_that_is_given_another_tensor_or_is_called_first_is_computed_alone_every_time(
    applied,
):
    first, second = pair()
    x = torch.randn(2, 3, 6)
    for _ in range(2):
        first(x)
        second(x.clone())
    assert applied == [5, 2, 5, 2]
    second(x)
    first(x)
    assert applied[4:] == [2, 5]
    second(x)
    assert applied[4:] == [2, 5]


def test_groups_of_sequences_share_their_draw_here_too():
    first, second = pair(groups=RowGroups(2))
    x = torch.randn(1, 3, 6).expand(4, 3, 6)
    for y in (first(x), second(x)):
        assert torch.equal(y[0], y[1])
        assert not torch.allclose(y[1], y[2])


def test_a_layer_at_its_mean_or_a_replica_is_computed_alone(applied):
    first, second = pair()
    x = torch.randn(2, 3, 6)
    second.eval()
    first(x)
    assert torch.equal(second(x), nn.functional.linear(x, second.weight))
    second.train()
    copy.copy(first)(x)
    copy.copy(second)(x)
    assert applied == [3, 3, 2]
    first(x)
    second(x)
    assert applied == [3, 3, 2, 5]


@pytest.mark.parametrize(
    ("names", "noise"),
    [
        (("a.q_proj.lora_A", "b.v_proj.lora_A"), "row"),
        (("a.q_proj.lora_A", "a.o_proj.lora_A"), "row"),
        (("a.q_proj.lora_A", "a.up_proj.lora_A"), "row"),
        (NAMES, "independent"),
        (NAMES, "token"),
    ],
)
def test_only_layers_of_one_block_that_take_one_tensor_are_put_together(names, noise):
    assert all(layer.fused is None for layer in pair(names=names, noise=noise))


def model_of(llama, dropout=0.0):
    config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=dropout)
    model = get_peft_model(llama(), config)
    bayesify(model)
    return model.train()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_in_a_model_queries_and_values_are_one_product_unless_dropout_gives_each_its_input(
    llama, applied, dropout
):
    model, ids = model_of(llama, dropout), torch.ones(2, 5, dtype=torch.long)
    for _ in range(2):
        model(input_ids=ids).logits.sum().backward()
    alone, together = [8] * 3, [16, 8]
    assert applied == (alone * 4 if dropout else together * 4)
    assert all(
        layer.root_std.grad is not None for layer in Slots(model).of_kind(GaussianLinear).values()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_that_recomputes_a_block_gets_the_same_draws_from_the_first_step_on(
    llama, dtype
):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = get_peft_model(llama().to(dtype), LoraConfig(target_modules=["q_proj", "v_proj"]))
        bayesify(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        torch.manual_seed(4)
        logits = model(inputs_embeds=torch.ones(2, 5, 32, dtype=dtype, requires_grad=True)).logits
        (logits.float() * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
        found.append(
            [layer.root_std.grad for layer in Slots(model).of_kind(GaussianLinear).values()]
        )
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


def test_a_copy_of_the_model_has_groups_of_its_own(llama):
    model = model_of(llama)
    twin = copy.deepcopy(model)
    ours, theirs = (list(Slots(one).of_kind(GaussianLinear).values()) for one in (model, twin))
    assert all(layer.fused is None or set(layer.fused.layers) <= set(theirs) for layer in theirs)
    assert not {id(layer.fused) for layer in ours if layer.fused} & {
        id(layer.fused) for layer in theirs
    }
