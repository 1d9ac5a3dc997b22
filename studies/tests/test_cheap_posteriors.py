"""Cheap posteriors: each arm's draws are what it says, a file that goes on, the table."""

import pytest
import torch
from torch.testing import assert_close

from bayestune.adapters import GaussianLinear, Lora, Slots, attach
from bayestune.forward import Draws
from bayestune.jsonl import read_json_lines
from bayestune.models import LoadedModel
from studies import cheap_posteriors as study
from studies.cheap_table import fitted_average
from tests.tiny import randomised

DRAWS = Draws(3)


@pytest.fixture
def posterior(llama, byte_level, tiny_task):
    """Makes an arm's posterior on a tiny model whose adapters reach the output, and a batch."""

    def make(kind, size, at_the_end=False):
        arm = study.Arm(kind, size)
        adapted = attach(llama(), Lora(4, 8, targets=("q_proj", "v_proj")))
        arm.prepare(adapted)
        randomised(adapted)
        scorer = arm.scorer(LoadedModel(llama(), byte_level, "tiny"), tiny_task)
        batch = scorer.collate(scorer.encode(tiny_task.evaluation[:3]))
        batch.pop("labels")
        return arm.posterior(adapted, scorer), batch

    return make


def test_noise_on_the_last_tokens_leaves_the_others_at_the_mean(posterior):
    one, _ = posterior("tokens", 2)
    layer = next(iter(Slots(one.model).of_kind(GaussianLinear).values())).train()
    x = torch.randn(3, 7, layer.in_features)
    mean = x @ layer.weight.T
    noisy = layer(x)
    assert_close(noisy[:, :-2], mean[:, :-2])
    assert (noisy[:, -2:] - mean[:, -2:]).abs().min() > 0


def test_an_adapter_at_the_end_of_the_whole_prompt_is_the_adapter(posterior):
    one, batch = posterior("adapter", 2)
    length = batch["input_ids"].shape[1]
    whole, _ = posterior("full", 0)
    whole.model = one.model
    base = whole.scorer(one.model.get_base_model(), batch)
    one.scorer.last = length - 1  # one token is left to the base
    few = whole.scorer.__class__
    assert one.logits(batch, DRAWS).shape == (3, 3, base.shape[1])
    mean = one.logits(batch, Draws(0))[0]
    drawn = one.logits(batch, DRAWS)
    assert few is not type(one.scorer)
    assert not torch.allclose(drawn[0], drawn[1])
    assert not torch.allclose(drawn.mean(0), mean)
