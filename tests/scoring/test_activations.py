"""A x where a row answers: each scorer's, against the row alone; logits of the same pass."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from bayestune.adapters import Slots
from bayestune.decisions import spread_out
from bayestune.forward import Draws
from bayestune.posteriors import Gaussian, Mixture, Point
from bayestune.scoring import HeadScorer, mean_pass, row_logits
from tiny import (
    CAUSAL,
    CLOSE,
    RAGGED,
    causal,
    converted,
    labelled_sentences,
    ragged_batches,
    randomised,
    tiny_bert,
)


def alone(model, slots, inputs, place):
    """A x (r,) by slot name of one row's tokens, from the layers' inputs and A's weights."""
    weights = slots.weights()
    found = {}
    hooks = []
    for path, layer in slots.layers.items():

        def see(_, args, name=f"{path}.lora_A"):
            row = args[0][0]
            found[name] = weights[name] @ (row if row.ndim == 1 else row[place])  # 1: pooled

        hooks.append(layer.register_forward_pre_hook(see))
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("kind", ["letter", "packed", "expanded"])
@pytest.mark.parametrize("family", list(CAUSAL))
def test_activations_are_those_of_the_prompt_alone(byte_level, family, kind):
    model = converted(causal(CAUSAL[family]))
    scorer, _ = ragged_batches(byte_level, kind, [])
    posterior = Gaussian(model, scorer)
    encoded = scorer.encode(RAGGED)
    logits, activations = mean_pass(posterior, scorer, encoded, batch_size=3)
    assert_close(logits, row_logits(posterior, scorer, encoded, Draws(0), batch_size=3))
    slots = posterior.slots
    assert set(activations) == set(slots.names())
    for number, row in enumerate(encoded):
        expected = alone(model, slots, {"input_ids": torch.tensor([row["ids"]])}, -1)
        for name, values in activations.items():
            assert_close(values[number], expected[name], **CLOSE)


@pytest.mark.parametrize("has_mark", [True, False])
def test_a_heads_activations_are_at_its_class_token_or_the_last_one(byte_level, has_mark):
    byte_level.cls_token = "<s>" if has_mark else None
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["query", "value", "dense"], task_type="SEQ_CLS")
    model = randomised(get_peft_model(tiny_bert(), lora))
    task = labelled_sentences()
    scorer = HeadScorer(byte_level, task)
    encoded = scorer.encode(task.train[:5])
    if has_mark:
        for row in encoded:
            row["inputs"]["input_ids"][0] = byte_level.cls_token_id
    _, activations = mean_pass(Point(model, scorer), scorer, encoded, batch_size=2)
    for number, row in enumerate(encoded):
        inputs = {name: torch.tensor([ids]) for name, ids in row["inputs"].items()}
        expected = alone(model, Slots(model), inputs, 0 if has_mark else -1)
        for name, values in activations.items():
            assert_close(values[number], expected[name], **CLOSE)


def test_what_has_no_activations(byte_level):
    model = converted(causal(CAUSAL["llama"]))
    scorer, _ = ragged_batches(byte_level, "letter", [])
    one = Gaussian(model, scorer)
    model.add_adapter("b", model.peft_config["default"])
    two = Mixture([one, Point(model, scorer, adapter="b")])
    with pytest.raises(ValueError, match="got a Mixture, which has no mean; expected one adapter"):
        mean_pass(two, scorer, scorer.encode(RAGGED))
    lora = LoraConfig(target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    embedded = get_peft_model(causal(CAUSAL["llama"]), lora)
    logits, activations = mean_pass(Point(embedded, scorer), scorer, scorer.encode(RAGGED))
    assert logits.isfinite().any()
    assert activations == {}
    assert spread_out(activations) is None
