"""Text scoring: each layout is the naive likelihood; all options of a question see one draw."""

import pytest
import torch
from ragged import CLOSE, RAGGED, TASK, adapted, naive_logits, wide_llama, with_ends
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from bayestune.adapters import bayesify
from bayestune.data import Question, Task
from bayestune.scoring import LetterScorer, TextScorer, make_scorer

LAYOUTS = ("packed", "expanded")


@pytest.fixture
def with_bos(byte_level):
    return with_ends(byte_level)


@pytest.fixture
def wide():
    return wide_llama()


def scored(scorer, model, rows=RAGGED):
    return scorer(model, scorer.collate(scorer.encode(rows)))


def with_gradients(model, logits):
    model.zero_grad()
    F.cross_entropy(logits, torch.tensor([row.answer for row in RAGGED])).backward()
    trained = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    return logits.detach(), {name: gradient.clone() for name, gradient in trained}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_layout_equals_the_naive_likelihood(with_bos, wide, attention, layout):
    wide.set_attn_implementation(attention)
    model = adapted(wide)
    scorer = make_scorer(wide, with_bos, TASK, "text", layout=layout)
    naive = naive_logits(model, scorer.encode(RAGGED))
    expected, expected_gradients = with_gradients(model, naive)
    logits, gradients = with_gradients(model, scored(scorer, model))
    assert len(gradients) == 10
    assert min(g.abs().max() for g in gradients.values()) > 1e-3
    assert_close(logits, expected, **CLOSE)
    assert_close(gradients, expected_gradients, **CLOSE)


# Which layout


def chosen_layout(model, tokenizer):
    return make_scorer(model, tokenizer, TASK, "text").layout


def test_the_layout_is_packed_where_the_model_can(byte_level, wide):
    assert chosen_layout(wide, byte_level) == "packed"
    assert chosen_layout(adapted(wide).get_base_model(), byte_level) == "packed"
    wide._is_stateful = True
    assert chosen_layout(wide, byte_level) == "expanded"
    wide._is_stateful = False
    wide.config._attn_implementation = "flash_attention_2"
    assert chosen_layout(wide, byte_level) == "expanded"


SMALL = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "initializer_range": 0.2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}


def test_full_attention_in_a_model_that_may_slide_is_packed(byte_level):
    model = MistralForCausalLM(MistralConfig(**SMALL, **HEADS, sliding_window=None))
    assert chosen_layout(model, byte_level) == "packed"


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (MistralForCausalLM, MistralConfig(**SMALL, **HEADS, sliding_window=4)),
        (MambaForCausalLM, MambaConfig(**SMALL, state_size=4)),
        (BloomForCausalLM, BloomConfig(**SMALL, n_head=2)),
        (FalconForCausalLM, FalconConfig(**SMALL, num_attention_heads=2, alibi=True)),
    ],
)
def test_a_model_that_goes_by_a_tokens_place_is_not_packed(byte_level, kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    scorer = make_scorer(model, byte_level, TASK, "text")
    assert scorer.layout == "expanded"
    naive = naive_logits(model, scorer.encode(RAGGED))
    assert_close(scored(scorer, model), naive, rtol=1e-4, atol=1e-4)


# Draws


SAME = tuple(Question(str(i), "what is red?", ("the sky",) * 3, None) for i in range(2))


@pytest.fixture(params=["row", "independent"])
def noisy(request, wide):
    """A Gaussian model in training, and what came out of each A in the last forward pass."""
    model = adapted(wide, targets=("q_proj", "v_proj"))
    bayesify(model, init_root_std=1.0, noise=request.param)
    outputs = {}
    for name, module in model.named_modules():
        if name.endswith("lora_B.default"):
            keep = lambda _, inputs, name=name: outputs.update({name: inputs[0].detach()})  # noqa: E731
            module.register_forward_pre_hook(keep)
    return model.train(), outputs


def same(values):
    return all(torch.allclose(value, values[0], atol=1e-5) for value in values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_noise_is_one_draw_a_question(byte_level, noisy, layout):
    model, outputs = noisy
    scorer = TextScorer(byte_level, Task("same", SAME, ()), layout=layout)
    logits = scored(scorer, model, SAME)
    assert same(logits.T)
    assert (logits[0] - logits[1]).abs().min() > 1e-3
    assert len(outputs) == 4
    for output in outputs.values():
        first, second = output.chunk(2)
        assert len(first) == (1 if layout == "packed" else 3)
        assert same(first)
        assert same(second)
        assert not torch.allclose(first[0], second[0], atol=0.1)


@pytest.mark.parametrize("noise", ["row", "independent"])
def test_a_noisy_training_step_is_the_same_in_both_layouts(with_bos, wide, noise):
    model = adapted(wide, targets=("q_proj", "v_proj"))
    bayesify(model, init_root_std=0.3, noise=noise)
    model.train()
    packed, expanded = (
        make_scorer(wide, with_bos, TASK, "text", layout=layout) for layout in LAYOUTS
    )
    torch.manual_seed(3)
    logits, gradients = with_gradients(model, scored(packed, model))
    torch.manual_seed(3)
    other_logits, other_gradients = with_gradients(model, scored(expanded, model))
    assert_close(logits, other_logits, **CLOSE)
    assert_close(gradients, other_gradients, **CLOSE)
    assert min(g.abs().max() for name, g in gradients.items() if "root_std" in name) > 1e-4
    torch.manual_seed(4)
    assert not torch.allclose(scored(expanded, model), logits, atol=1e-2)


def test_training_noise_is_per_row_again_after_an_expanded_batch(byte_level, noisy):
    model, outputs = noisy
    task = Task("same", SAME, ())
    expanded = TextScorer(byte_level, task, layout="expanded")
    rows = SAME + SAME[:1]  # as many as a question has options
    for other in (TextScorer(byte_level, task, layout="packed"), LetterScorer(byte_level, task)):
        scored(expanded, model, rows)
        scored(other, model, rows)
        for output in outputs.values():
            assert not torch.allclose(output[0], output[1], atol=0.1)
