"""The Gaussian layer: the mean in evaluation, one draw a row in training; its life under PEFT."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.testing import assert_close
from transformers import GPT2LMHeadModel

from bayestune.adapters import GaussianLinear, Slots, bayesify
from tiny import BATCH, CLOSE, GPT2, adapted, converted, end_logits, tiny_llama, with_second

NOISES = ["row", "independent", "token"]
PASSES = 4000


def layer(noise: str = "row", width: int = 6) -> GaussianLinear:
    torch.manual_seed(5)
    return GaussianLinear(nn.Linear(width, 3, bias=False), 0.7, noise).double()


def double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_the_weight_is_the_linear_layers_own_parameter():
    plain = nn.Linear(4, 2, bias=False)
    gaussian = GaussianLinear(plain)
    assert gaussian.weight is plain.weight
    assert [name for name, _ in gaussian.named_parameters()] == ["weight", "root_std"]
    plain.weight.requires_grad_(False)
    assert not GaussianLinear(plain).root_std.requires_grad


def test_the_standard_deviation_starts_where_the_paper_starts_it():
    root = GaussianLinear(nn.Linear(400, 400, bias=False), 0.05).root_std
    low = 0.05 / math.sqrt(2)
    assert low <= root.min() <= root.max() <= 0.05
    error = (0.05 - low) / math.sqrt(12 * root.numel())
    assert root.mean().item() == pytest.approx((low + 0.05) / 2, abs=4.5 * error)


def test_settings_that_make_no_sense_are_refused():
    plain = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match="unknown noise: got 'rows', expected one of"):
        GaussianLinear(plain, noise="rows")
    with pytest.raises(ValueError, match="init_root_std must be positive: got 0"):
        GaussianLinear(plain, init_root_std=0)


# The law of a pass


@pytest.mark.parametrize("noise", NOISES)
def test_evaluation_is_the_mean(noise):
    module = layer(noise).eval()
    x = double(2, 5, 6)
    assert torch.equal(module(x), linear(x, module.weight))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", [(3, 6), (3, 4, 6)])
def test_training_has_the_posteriors_moments(noise, shape):
    module = layer(noise)
    x = double(*shape)
    with torch.no_grad():
        samples = torch.stack([module(x) for _ in range(PASSES)])
    mean = linear(x, module.weight)
    variance = linear(x.square(), module.std.square())
    assert ((samples.mean(0) - mean) / (variance / PASSES).sqrt()).abs().max() < 4.5
    assert (samples.var(0) / variance - 1).abs().max() < 4.5 * math.sqrt(3 / PASSES)


@pytest.mark.parametrize(
    ("noise", "of_tokens"), [("row", 1.0), ("independent", 1.0), ("token", 0.0)]
)
def test_tokens_of_a_row_share_a_draw_unless_signs_are_per_token_and_rows_never_do(
    noise, of_tokens
):
    module = layer(noise, width=32)
    x = double(1, 1, 32).expand(2, 2, 32)  # one token everywhere: only the noise can differ
    with torch.no_grad():
        noises = torch.stack([module(x) - linear(x, module.weight) for _ in range(3000)])

    def correlation(other: torch.Tensor) -> float:
        pair = torch.stack([noises[:, 0, 0].flatten(), other.flatten()])
        return torch.corrcoef(pair)[0, 1].item()

    bound = 4.5 / math.sqrt(9000)
    assert correlation(noises[:, 0, 1]) == pytest.approx(of_tokens, abs=bound)
    assert correlation(noises[:, 1, 0]) == pytest.approx(0, abs=bound)


@pytest.mark.parametrize("noise", NOISES)
def test_gradients_are_those_of_the_draw_that_was_used(noise):
    module = layer(noise)
    x = double(2, 3, 6).requires_grad_()

    def output(x: torch.Tensor, weight: torch.Tensor, root_std: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        values = {"weight": weight, "root_std": root_std}
        return torch.func.functional_call(module, values, (x,))

    assert torch.autograd.gradcheck(output, (x, module.weight, module.root_std))


@pytest.mark.parametrize(
    ("noise", "stored"), [("row", False), ("independent", False), ("token", True)]
)
def test_only_per_token_signs_store_tensors_of_the_activations_size(noise, stored):
    x = torch.randn(2, 512, 64, requires_grad=True)

    def saved(module: nn.Module) -> int:
        sizes = {}

        def keep(value: torch.Tensor) -> torch.Tensor:
            storage = value.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            module(x)
        return sum(sizes.values())

    plain = nn.Linear(64, 4, bias=False)
    extra = saved(GaussianLinear(plain, 0.1, noise)) - saved(plain)
    assert (extra > x.nbytes / 2) is stored


# Under PEFT


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return end_logits(model, BATCH)


def loss(model: nn.Module) -> torch.Tensor:
    return model(**BATCH, labels=BATCH["input_ids"]).loss


def gradients(model: nn.Module) -> list[torch.Tensor]:
    """Of G, after a pass and its backward pass."""
    model.train()
    torch.manual_seed(4)
    loss(model).backward()
    return [slot.root_std.grad for slot in Slots(model).of_kind(GaussianLinear).values()]


def test_the_mean_is_the_lora_model_and_training_reaches_the_output():
    model = adapted(tiny_llama())
    before = logits(model)
    assert bayesify(model, init_root_std=0.5) == 4
    assert torch.equal(logits(model), before)
    noisy = torch.stack([logits(model.train()) for _ in range(8)])
    assert noisy.var(0).min() > 0


def test_merging_unmerging_and_disabling_see_the_mean_and_the_base():
    base = tiny_llama().eval()
    plain = logits(base)
    model = converted(base)
    mean = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model.train()), plain)
    model.merge_adapter()
    assert_close(logits(model.train()), mean, **CLOSE)
    model.unmerge_adapter()
    assert_close(logits(model.eval()), mean, **CLOSE)
    assert_close(logits(model.merge_and_unload()), mean, **CLOSE)


def test_a_second_adapter_is_converted_for_itself():
    model = with_second(adapted(tiny_llama()))
    names = Slots(model).names(layers=("q_proj",))
    assert bayesify(model, adapter="b", slots=names) == 2
    assert list(Slots(model, "b").of_kind(GaussianLinear)) == names
    assert not Slots(model).of_kind(GaussianLinear)
    assert bayesify(model, slots=Slots(model).names(("lora_B",), ("v_proj",))) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_that_recomputes_a_block_gets_the_same_draws(dtype):
    plain = converted(tiny_llama().to(dtype))
    twin = copy.deepcopy(plain)
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    twin.enable_input_require_grads()
    assert_close(gradients(twin), gradients(plain), rtol=1e-4, atol=1e-6)


def test_a_bfloat16_base_trains_under_autocast():
    model = converted(tiny_llama().to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(gradient.isfinite().all() for gradient in gradients(model))


def test_other_architectures_train_too():
    found = gradients(converted(GPT2LMHeadModel(GPT2), fan_in_fan_out=True))
    assert len(found) == 3
    assert all(gradient.abs().max() > 0 for gradient in found)


def test_an_adapter_on_a_tied_head_works_and_leaves_the_embedding_alone():
    base = tiny_llama(tie_word_embeddings=True).eval()
    hidden = base.model(**BATCH).last_hidden_state
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = converted(base, target_modules=["lm_head"])
    with model.disable_adapter():
        plain = logits(model)
    assert not torch.allclose(logits(model), plain, atol=1e-3)
    assert torch.equal(base.model(**BATCH).last_hidden_state, hidden)
    assert torch.stack([logits(model.train()) for _ in range(4)]).var(0).max() > 0
