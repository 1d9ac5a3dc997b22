"""On a GPU: what is fitted there answers on the CPU as it does there."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.testing import assert_close

from bayestune import Gaussian, KLStep, LastToken, bayesify, load_posterior, save_posterior
from bayestune.forward import Draws
from bayestune.methods import METHODS
from promises import SHORT, Case
from tiny import randomised, tiny_llama

pytestmark = pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="no accelerator is there"
)
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)


def there():
    return torch.accelerator.current_accelerator()


# the noise of these is drawn in the pass, by the device's own generator
HELD = [name for name in METHODS if name not in ("mc_dropout", "blob_authors")]


@pytest.mark.parametrize("name", HELD)
def test_held_draws_are_the_same_on_the_cpu(name, tmp_path):
    case = Case()
    posterior = case.fit(METHODS[name](**SHORT.get(name, {})))
    assert next(posterior.model.parameters()).device.type == there().type
    loaded = load_posterior(case.make(), save_posterior(posterior, tmp_path), case.scorer)
    assert next(loaded.model.parameters()).device.type == "cpu"
    for draws in (Draws(3), Draws(0)) if posterior.has_mean else (Draws(3),):
        seen = posterior.logits(case.batch, draws).cpu()
        assert_close(loaded.logits(case.batch, draws).cpu(), seen, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["blob", "mle", "laplace", "distilled"])
def test_the_mean_of_a_fit_in_bfloat16_is_near_the_one_in_float32(name):
    case = Case()
    method = METHODS[name](**SHORT.get(name, {}))
    one, half = (case.fit(method, bf16=bf16).logits(case.batch, Draws(0)) for bf16 in (False, True))
    options = one.isfinite()
    assert_close(half[options].float(), one[options], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("layout", ["packed", "expanded"])
def test_texts_are_trained_on(layout):
    posterior = Case("text", layout=layout).fit(METHODS["blob"]())
    assert posterior.report.steps == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loop_of_ones_own_scales_the_loss(dtype):
    model = get_peft_model(tiny_llama(), LORA).to(there())
    bayesify(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    KLStep(prior_std=0.2, final_std=0.1).attach(model, optimizer, total_steps=30)
    scaler = torch.amp.GradScaler(there().type, enabled=dtype == torch.float16)
    ids = torch.randint(3, 400, (6, 9), device=there())
    losses = []
    for _ in range(30):
        with torch.autocast(there().type, dtype=dtype):
            logits = model(input_ids=ids).logits
        loss = F.cross_entropy(logits[:, -1].float(), ids[:, 0])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert all(p.isfinite().all() for p in model.parameters())


def test_draws_under_compile_are_those_without():
    case = Case()
    posterior = case.fit(METHODS["blob"]())
    plain = posterior.logits(case.batch, Draws(3))
    posterior.model.compile()
    assert_close(posterior.logits(case.batch, Draws(3)), plain, rtol=1e-3, atol=1e-3)


def test_lora_of_ones_own_is_drawn_there_as_on_the_cpu():
    model = randomised(get_peft_model(tiny_llama(), LORA))
    bayesify(model)
    batch = {"input_ids": torch.randint(3, 400, (6, 9))}
    posterior = Gaussian(model, LastToken([3, 4, 5]))
    cpu = posterior.logits(batch, Draws(4))
    model.to(there())
    assert_close(posterior.logits(batch, Draws(4)).cpu(), cpu.cpu(), rtol=1e-3, atol=1e-3)
