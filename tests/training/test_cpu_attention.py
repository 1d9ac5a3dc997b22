"""Training on a CPU in bfloat16 over short rows takes attention apart; the function stays the same."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import TrainerCallback

from bayestune.adapters import Lora
from bayestune.scoring import make_scorer
from bayestune.training import Training, start_adapter, train
from bayestune.training import training as engine
from bayestune.training.cpu_attention import SHORT, eager_attention, trains_faster_eagerly

SETTINGS = Training(
    lora=Lora(targets=("q_proj", "v_proj")), steps=3, batch_size=4, bf16=True, progress=False
)


class Spy(TrainerCallback):
    """Which attention a run had."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen = model.get_base_model().config._attn_implementation


def test_the_rule(llama):
    model = llama()
    assert trains_faster_eagerly(model, SHORT, bf16=True)
    assert trains_faster_eagerly(llama().bfloat16(), SHORT, bf16=False)
    assert not trains_faster_eagerly(model, SHORT, bf16=False)
    assert not trains_faster_eagerly(model, SHORT + 1, bf16=True)
    assert not trains_faster_eagerly(model.to("meta"), SHORT, bf16=True)
    other = llama()
    other.set_attn_implementation("eager")
    assert not trains_faster_eagerly(other, SHORT, bf16=True)


def test_the_models_own_comes_back_whatever_happens(llama):
    model = llama()
    with eager_attention(model, active=False):
        assert model.config._attn_implementation == "sdpa"
    context = eager_attention(model)
    context.__enter__()
    assert model.config._attn_implementation == "eager"
    assert not context.__exit__(KeyError, KeyError(), None)
    assert model.config._attn_implementation == "sdpa"


def test_logits_and_gradients_are_the_same(llama):
    model = llama(initializer_range=0.2)
    ids = torch.randint(3, 400, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    found = []
    for active in (False, True):
        with eager_attention(model, active):
            logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits
        weight = model.model.layers[0].self_attn.q_proj.weight
        found.append([logits, *torch.autograd.grad(logits.square().sum(), [weight])])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scoring", "layout", "bf16", "expected"),
    [
        ("letter", None, True, "eager"),
        ("letter", None, False, "sdpa"),
        ("text", "packed", True, "sdpa"),
        ("text", "expanded", True, "eager"),
    ],
)
def test_training_takes_what_is_faster(
    llama, byte_level, labelled_task, scoring, layout, bf16, expected
):
    base, spy = llama(), Spy()
    scorer = make_scorer(base, byte_level, labelled_task, scoring, layout=layout)
    settings = replace(SETTINGS, bf16=bf16)
    train(start_adapter(base, settings), scorer, settings, [spy])
    assert spy.seen == expected
    assert base.config._attn_implementation == "sdpa"


def test_a_run_ends_where_it_would_have_ended(llama, byte_level, labelled_task, monkeypatch):
    ends = []
    for active in (True, False):
        monkeypatch.setattr(engine, "trains_faster_eagerly", lambda *_, active=active, **__: active)
        base = llama()
        model = start_adapter(base, SETTINGS)
        fitted = train(
            model,
            make_scorer(base, byte_level, labelled_task),
            replace(SETTINGS, learning_rate=1e-2),
        )
        ends.append(
            (fitted.history[-1]["train_loss"], [p for p in model.parameters() if p.requires_grad])
        )
    (one, ours), (other, theirs) = ends
    assert one == pytest.approx(other, rel=1e-2)
    moved = max((p - q).abs().max().item() for p, q in zip(ours, theirs, strict=True))
    assert (
        moved < 0.02
    )  # of steps of 1e-2: rounding may turn the sign of a gradient that is nearly 0
