"""Training on a CPU in bfloat16 over short rows takes attention apart; the function is the same."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import TrainerCallback

from bayestune.adapters import Lora
from bayestune.training import fit_adapter
from bayestune.training import training as engine
from bayestune.training.cpu_attention import SHORT, eager_attention, trains_faster_eagerly
from promises import TRAINING, Case
from tiny import tiny_llama

SETTINGS = replace(TRAINING, lora=Lora(targets=("q_proj", "v_proj")), steps=3)


class Spy(TrainerCallback):
    """Which attention a run had."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen = model.get_base_model().config._attn_implementation


def eager_llama():
    model = tiny_llama()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize(
    ("model", "length", "bf16", "faster"),
    [
        (tiny_llama(), SHORT, True, True),
        (tiny_llama().bfloat16(), SHORT, False, True),
        (tiny_llama(), SHORT, False, False),
        (tiny_llama(), SHORT + 1, True, False),
        (tiny_llama().to("meta"), SHORT, True, False),
        (eager_llama(), SHORT, True, False),
    ],
)
def test_the_rule(model, length, bf16, faster):
    assert trains_faster_eagerly(model, length, bf16=bf16) is faster


def test_the_models_own_comes_back_whatever_happens():
    model = tiny_llama()
    with eager_attention(model, active=False):
        assert model.config._attn_implementation == "sdpa"
    context = eager_attention(model)
    context.__enter__()
    assert model.config._attn_implementation == "eager"
    assert not context.__exit__(KeyError, KeyError(), None)
    assert model.config._attn_implementation == "sdpa"


def test_logits_and_gradients_are_the_same():
    model = tiny_llama(initializer_range=0.2)
    ids = torch.randint(3, 400, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    weight = model.model.layers[0].self_attn.q_proj.weight
    found = []
    for active in (False, True):
        with eager_attention(model, active):
            logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits
        found.append([logits, *torch.autograd.grad(logits.square().sum(), [weight])])
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "bf16", "expected"),
    [
        ({}, True, "eager"),
        ({}, False, "sdpa"),
        ({"scoring": "text", "layout": "packed"}, True, "sdpa"),
        ({"scoring": "text", "layout": "expanded"}, True, "eager"),
    ],
)
def test_training_takes_what_is_faster(options, bf16, expected):
    case, spy = Case(**options), Spy()
    base = case.make()
    fit_adapter(base, case.scorer, replace(SETTINGS, bf16=bf16), [spy])
    assert spy.seen == expected
    assert base.config._attn_implementation == "sdpa"


def test_a_run_ends_where_it_would_have_ended(monkeypatch):
    case, fits = Case(), []
    for active in (True, False):
        monkeypatch.setattr(engine, "trains_faster_eagerly", lambda *_, active=active, **__: active)
        fits.append(fit_adapter(case.make(), case.scorer, replace(SETTINGS, bf16=True)))
    (ours, one), (theirs, other) = fits
    loss = other.history[-1]["train_loss"]
    assert one.history[-1]["train_loss"] == pytest.approx(loss, rel=1e-2)
    # steps of 1e-2: rounding may turn the sign of a gradient that is nearly 0
    assert_close(list(ours.parameters()), list(theirs.parameters()), atol=0.02, rtol=0)
