"""A shared prefix: the mean reads the prompt once, the draws read its end."""

import copy
import inspect

import pytest
import torch
from torch.testing import assert_close
from transformers import Lfm2Config, Lfm2ForCausalLM

from bayestune.adapters import Slots
from bayestune.forward import Batch, Draws
from bayestune.forward.shared_prefix import SharedPrefix
from bayestune.posteriors import Gaussian
from tiny import (
    CAUSAL,
    CLOSE,
    WIDE,
    causal,
    converted,
    end_logits,
    passes,
    ragged_batches,
    tiny_bert,
    tiny_llama,
)

KINDS = ["letter", "packed", "expanded"]


@pytest.fixture
def make(byte_level):
    """Makes a posterior of a language model and a batch of prompts."""

    def make(kind: str = "letter", root_std: float = 0.5) -> tuple[Gaussian, Batch]:
        scorer, (batch,) = ragged_batches(byte_level, kind, [(0, 1, 2)])
        return Gaussian(converted(causal(CAUSAL["llama"]), root_std), scorer), batch

    return make


def by_hand(posterior: Gaussian, batch: Batch, draws: Draws) -> torch.Tensor:
    """The mean reads the prefix, a draw's weights are put into the slots, and they read the end."""
    model = posterior.model
    accepted = inspect.signature(model.get_base_model().forward).parameters
    cache = "cache" if "cache" in accepted else "past_key_values"
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    split = tokens["input_ids"].shape[1] - draws.shared_prefix
    prefix = {name: value[:, :split] for name, value in tokens.items()}
    end = {name: value[:, split:] for name, value in tokens.items()}
    end["attention_mask"] = tokens["attention_mask"]
    found = []
    with torch.no_grad():
        for index in draws.indices:
            read = getattr(model(**prefix), cache)
            twin = copy.deepcopy(model)
            for name, weight in posterior.draw(index, draws.seed).items():
                Slots(twin).modules()[name].weight.copy_(weight)
            logits = twin(**end, **{cache: read}).logits[
                :, -1, posterior.scorer.tokens[: batch["option_mask"].shape[1]]
            ]
            found.append(logits.masked_fill(~batch["option_mask"], -torch.inf))
    return torch.stack(found)


@pytest.mark.parametrize("length", [1, 3, 16])
@pytest.mark.parametrize(("bounds", "at_once"), [({}, [4]), ({"max_rows": 6}, [2, 2])])
def test_the_mean_reads_the_prefix_and_each_draw_the_end(make, length, bounds, at_once):
    posterior, batch = make()
    draws = Draws(4, seed=1, shared_prefix=length, **bounds)
    expected = by_hand(posterior, batch, draws)
    seen = passes(posterior.model)
    found = posterior.logits(batch, draws)
    assert_close(found, expected, **CLOSE)
    rows, tokens = batch["input_ids"].shape
    assert seen == [(rows, tokens - length), *((size * rows, length) for size in at_once)]
    assert not torch.allclose(found, posterior.logits(batch, Draws(4, seed=1)), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_as_long_as_the_prompt_is_exact(make, kind):
    posterior, batch = make(kind)
    exact = posterior.logits(batch, Draws(3))
    assert_close(posterior.logits(batch, Draws(3, shared_prefix=1000)), exact, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 4])
def test_without_noise_it_is_the_mean(make, kind, length):
    posterior, batch = make(kind, root_std=1e-6)
    mean = posterior.logits(batch, Draws(0)).expand(3, -1, -1)
    assert_close(posterior.logits(batch, Draws(3, shared_prefix=length)), mean, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_more_tokens_of_the_prompt_have_more_of_the_noise(make, kind):
    posterior, batch = make(kind, root_std=0.2)
    spread = []
    for length in (1, 12, 1000):
        logits = posterior.logits(batch, Draws(64, shared_prefix=length))
        spread.append(logits.nan_to_num(neginf=0).var(0).mean())
    assert 0 < spread[0] < spread[1] < spread[2]


def test_the_next_batch_reads_a_prefix_of_its_own(make):
    posterior, batch = make()
    draws = Draws(3, shared_prefix=2)
    expected = posterior.logits(batch, draws).flip(1)
    flipped = {name: value.flip(0) for name, value in batch.items()}
    assert_close(posterior.logits(flipped, draws), expected, **CLOSE)


def test_models_that_keep_no_keys_and_values_are_refused():
    with pytest.raises(ValueError, match="got 0; 16 is usual"):
        SharedPrefix(Slots(tiny_llama()), 0)
    with pytest.raises(ValueError, match="got a BertForSequenceClassification, expected a causal"):
        SharedPrefix(Slots(tiny_bert()), 4)


def test_a_model_that_remembers_in_another_way_is_refused():
    config = Lfm2Config(**WIDE, layer_types=["conv", "full_attention", "full_attention"])
    posterior = Gaussian(converted(Lfm2ForCausalLM(config)), end_logits)
    batch = {"input_ids": torch.ones(2, 8, dtype=torch.long)}
    assert posterior.logits(batch, Draws(2)).shape == (2, 2, 5)
    with pytest.raises(
        ValueError, match="got a Lfm2ForCausalLM that remembers in .*Layer.*, expec"
    ):
        posterior.logits(batch, Draws(2, shared_prefix=2))
