"""Draws' work that is shared: exactly, before the first drawn block, and approximately, in the prompt's prefix."""

import copy
import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import Lfm2Config, Lfm2ForCausalLM

from bayestune.adapters import GaussianLinear, Slots, bayesify
from bayestune.data import Question, Task
from bayestune.forward import Draws
from bayestune.forward.shared_prefix import SharedPrefix
from bayestune.posteriors import Dropout, Gaussian, Mixture, Point, TokenNoise, predict
from bayestune.scoring import LetterScorer, TextScorer

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ROWS = (
    Question("a", "what is red?", ("red", "the blue sky and grass", "green"), 1),
    Question(
        "b", "what is the question for the answer and the passage below?", ("sky", "grass"), 0
    ),
    Question("c", "is sky?", ("green grass", "red", "the", "Return the label"), 3),
)


def converted(
    model: nn.Module, layers: tuple[int, ...] | None = None, root_std: float = 0.5
) -> nn.Module:
    """A PEFT model with B not zero, whose A is Gaussian in some of its blocks (None: all)."""
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    names = Slots(model).names()
    chosen = [name for name in names if layers is None or int(name.split(".")[2]) in layers]
    bayesify(model, init_root_std=root_std, slots=chosen)
    return model


@pytest.fixture
def make(llama, byte_level):
    """Makes a posterior and a batch of real prompts, by letter or by text in a layout."""

    def make(kind="letter", layers=None, root_std=0.5, rows=ROWS):
        task = Task("ragged", ROWS, ())
        scorer = (
            LetterScorer(byte_level, task)
            if kind == "letter"
            else TextScorer(byte_level, task, layout=kind)
        )
        model = llama(num_hidden_layers=4, initializer_range=0.2)
        posterior = Gaussian(converted(model, layers, root_std), scorer)
        batch = scorer.collate(scorer.encode(rows))
        batch.pop("labels")
        return posterior, batch

    return make


def one_by_one(posterior, batch, draws):
    """Each draw copied into the weights, a plain pass of the mean for each."""
    passes = []
    for index in draws.indices:
        with torch.no_grad():
            kept = {
                name: slot.weight.clone()
                for name, slot in Slots(posterior.model).of_kind(GaussianLinear).items()
            }
            for name, weight in posterior.draw(index, draws.seed).items():
                Slots(posterior.model).modules()[name].weight.copy_(weight)
            passes.append(posterior.logits(batch, Draws(0))[0])
            for name, weight in kept.items():
                Slots(posterior.model).modules()[name].weight.copy_(weight)
    return torch.stack(passes)


def same(ours, theirs):
    present = theirs.isfinite()
    assert torch.equal(ours.isfinite(), present)
    assert_close(ours[present], theirs[present], **CLOSE)


def shapes_seen(model):
    """Rows and tokens that leave each block, pass by pass."""
    seen = {}
    for i, block in enumerate(model.get_base_model().model.layers):
        block.register_forward_hook(
            lambda _, args, out, i=i: seen.setdefault(i, []).append(tuple(out.shape[:2]))
        )
    return seen


@pytest.mark.parametrize("kind", ["letter", "packed", "expanded"])
@pytest.mark.parametrize("layers", [(2, 3), (3,), (1, 3), None])
def test_blocks_before_the_first_drawn_one_run_once_and_nothing_changes(make, kind, layers):
    posterior, batch = make(kind, layers)
    plain = one_by_one(posterior, batch, Draws(3))
    seen = shapes_seen(posterior.model)
    same(posterior.logits(batch, Draws(3)), plain)
    sequences, first = len(batch["input_ids"]), min(layers or (0,))
    assert [seen[i][0][0] for i in range(4)] == [
        sequences * (1 if i < first else 3) for i in range(4)
    ]


def test_one_row_and_a_batch_without_masks_run_once_too(llama):
    model = converted(llama(num_hidden_layers=3, initializer_range=0.2), (2,))
    posterior = Gaussian(model, lambda model, batch: model(**batch).logits[:, -1, :5])
    for rows in (1, 3):
        batch = {
            "input_ids": torch.randint(
                3, 400, (rows, 7), generator=torch.Generator().manual_seed(0)
            )
        }
        same(posterior.logits(batch, Draws(4)), one_by_one(posterior, batch, Draws(4)))


def test_later_draws_of_a_set_go_on_where_the_first_ended(make):
    posterior, batch = make()
    whole = posterior.logits(batch, Draws(5, seed=2))
    same(posterior.logits(batch, Draws(2, seed=2, first=3)), whole[3:])
    same(posterior.logits(batch, Draws(5, seed=2)), whole)


def by_hand(posterior, batch, draws):
    """Shared-prefix draws by letter, draw by draw: the mean reads, the draw's weights are put in, they end."""
    model, ids = posterior.model.eval(), batch["input_ids"]
    cache = (
        "cache"
        if "cache" in inspect.signature(model.get_base_model().forward).parameters
        else "past_key_values"
    )
    split, mask, places = (
        ids.shape[1] - draws.shared_prefix,
        batch["attention_mask"],
        batch["position_ids"],
    )
    passes = []
    with torch.no_grad():
        for index in draws.indices:
            start = model(
                input_ids=ids[:, :split],
                attention_mask=mask[:, :split],
                position_ids=places[:, :split],
            )
            kept = dict(Slots(model).of_kind(GaussianLinear))
            drawn = {name: copy.deepcopy(slot) for name, slot in kept.items()}
            for name, weight in posterior.draw(index, draws.seed).items():
                drawn[name].weight.copy_(weight)
            Slots(model).put(drawn)
            end = model(
                input_ids=ids[:, split:],
                attention_mask=mask,
                position_ids=places[:, split:],
                **{cache: getattr(start, cache)},
            )
            Slots(model).put(kept)
            present = batch["option_mask"]
            logits = end.logits[:, -1, posterior.scorer.tokens[: present.shape[1]]]
            passes.append(logits.masked_fill(~present, -torch.inf))
    return torch.stack(passes)


@pytest.mark.parametrize("length", [1, 3, 16])
@pytest.mark.parametrize("bounds", [{}, {"max_rows": 6}])
def test_a_shared_prefix_is_read_by_the_mean_and_ended_by_each_draw(make, length, bounds):
    posterior, batch = make()
    draws = Draws(4, seed=1, shared_prefix=length, **bounds)
    plain = by_hand(posterior, batch, draws)
    seen = shapes_seen(posterior.model)
    found = posterior.logits(batch, draws)
    same(found, plain)
    assert not torch.allclose(found, posterior.logits(batch, Draws(4, seed=1)), atol=1e-2)
    rows, tokens = batch["input_ids"].shape
    ends = [(2 * rows, length)] * 2 if bounds else [(4 * rows, length)]
    assert seen[0][: 1 + len(ends)] == [(rows, tokens - length), *ends]


@pytest.mark.parametrize("kind", ["letter", "packed", "expanded"])
def test_a_prefix_shared_of_the_whole_prompt_is_exact(make, kind):
    posterior, batch = make(kind)
    same(posterior.logits(batch, Draws(3, shared_prefix=1000)), posterior.logits(batch, Draws(3)))


@pytest.mark.parametrize("kind", ["letter", "packed", "expanded"])
@pytest.mark.parametrize("length", [1, 4])
def test_a_shared_prefix_without_noise_is_the_mean(make, kind, length):
    posterior, batch = make(kind, root_std=1e-6)
    mean = posterior.logits(batch, Draws(0))
    same(posterior.logits(batch, Draws(3, shared_prefix=length)), mean.expand(3, -1, -1))


@pytest.mark.parametrize("kind", ["letter", "packed", "expanded"])
def test_more_tokens_of_the_prompt_draw_more_of_the_noise(make, kind):
    posterior, batch = make(kind, root_std=0.2)
    spread = []
    for length in (1, 12, 1000):
        logits = posterior.logits(batch, Draws(64, shared_prefix=length))
        spread.append(logits.masked_fill(logits.isinf(), 0).var(0).mean())
    assert 0 < spread[0] < spread[1] < spread[2]


def test_predict_takes_a_shared_prefix(make):
    posterior, batch = make()
    found = predict(posterior, batch, 4, shared_prefix=2).probabilities
    assert_close(
        found, posterior.logits(batch, Draws(4, shared_prefix=2)).double().softmax(-1).mean(0)
    )
    assert not torch.allclose(found, predict(posterior, batch, 4).probabilities, atol=1e-4)


def test_the_batch_after_reads_its_own_prefix(make):
    posterior, batch = make()
    other = {name: value.flip(0) for name, value in batch.items()}
    draws = Draws(3, shared_prefix=2)
    same(posterior.logits(other, draws), posterior.logits(batch, draws).flip(1))


def test_models_that_keep_no_keys_and_values_are_refused(bert, llama):
    with pytest.raises(ValueError, match="got 0; 16 is usual"):
        SharedPrefix(Slots(llama()), 0)
    with pytest.raises(
        ValueError, match="got a BertForSequenceClassification, expected a causal language model"
    ):
        SharedPrefix(Slots(bert()), 4)


def test_a_model_that_remembers_in_another_way_is_refused():
    config = Lfm2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    model = get_peft_model(Lfm2ForCausalLM(config), LoraConfig(target_modules=["q_proj", "v_proj"]))
    bayesify(model)
    posterior = Gaussian(model, lambda model, batch: model(**batch).logits[:, -1, :3])
    batch = {"input_ids": torch.ones(2, 8, dtype=torch.long)}
    assert posterior.logits(batch, Draws(2)).shape == (2, 2, 3)
    with pytest.raises(
        ValueError,
        match="got a Lfm2ForCausalLM that remembers in .*Layer.*, expected keys and values",
    ):
        posterior.logits(batch, Draws(2, shared_prefix=2))


def test_posteriors_whose_draws_cannot_share_one_are_refused(make, llama):
    posterior, batch = make()
    with pytest.raises(
        ValueError, match="TokenNoise draws are not adapters, so they cannot share a prefix: got"
    ):
        TokenNoise(posterior.model, posterior.scorer).logits(batch, Draws(2, shared_prefix=2))
    dropping = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], lora_dropout=0.1))
    with pytest.raises(ValueError, match="Dropout draws are not adapters"):
        Dropout(dropping, posterior.scorer).logits(batch, Draws(2, shared_prefix=2))


def test_a_mixture_that_runs_in_one_pass_has_no_mean_to_read_with(make):
    posterior, batch = make()
    posterior.model.add_adapter("other", LoraConfig(target_modules=["q_proj", "v_proj"]))
    both = Mixture([posterior, Point(posterior.model, posterior.scorer, adapter="other")])
    assert both.logits(batch, Draws(2)).shape[0] == 2
    with pytest.raises(ValueError, match="got a Mixture without a mean adapter to read it with"):
        both.logits(batch, Draws(2, shared_prefix=2))
