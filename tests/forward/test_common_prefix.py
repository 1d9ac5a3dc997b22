"""Tokens that all rows begin with are read once for each draw: the same logits, fewer tokens, and never a stale one."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

from bayestune.adapters import Slots, bayesify
from bayestune.curvature import Diagonal
from bayestune.data import Prompt, Question, Task
from bayestune.forward import Draws
from bayestune.forward import common_prefix as common
from bayestune.forward.common_prefix import CommonPrefix, without_common_prefix
from bayestune.posteriors import Gaussian, LowRank, Mixture, Point, Sampled, Scaled, Tempered
from bayestune.scoring import LetterScorer, TextScorer
from bayestune.scoring.last_logits import last_logits
from bayestune.scoring.tokens import left_padded, positions

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ROWS = tuple(
    Question(f"{i}", text, ("red", "the blue sky", "green grass")[: 2 + i % 2], 0)
    for i, text in enumerate(
        (
            "what is red?",
            "what is the question for the answer and the passage below?",
            "is sky?",
            "the grass and sky?",
        )
    )
)
_SHOT = "Question: what is red and what is green?\nChoices:\nA) the sky\nB) grass\nAnswer: B\n\n"
_ASKED = _SHOT + "Question: {question}\n"
PROMPT = Prompt(letter=_ASKED + "Choices:\n{choices}\nAnswer:", text=_ASKED + "Answer:")
SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
OPT = {
    **SIZES,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "init_std": 0.2,
    "do_layer_norm_before": True,
}
MODELS = {
    "llama": (LlamaConfig(**SIZES), ["q_proj", "v_proj"]),
    "qwen2": (Qwen2Config(**SIZES), ["q_proj", "v_proj"]),
    "mistral": (MistralConfig(**SIZES, sliding_window=None), ["q_proj", "v_proj"]),
    "mistral, wide window": (MistralConfig(**SIZES, sliding_window=300), ["q_proj", "v_proj"]),
    "gemma2": (Gemma2Config(**SIZES, head_dim=8, sliding_window=300), ["q_proj", "v_proj"]),
    "gpt2": (
        GPT2Config(vocab_size=400, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2),
        ["c_attn"],
    ),
    "opt": (OPTConfig(**OPT), ["q_proj", "v_proj"]),
    "neox": (GPTNeoXConfig(**SIZES), ["query_key_value"]),
}
UNFIT = {  # their tokens go by more than keys, values and position ids, or they give no logits of the last tokens alone
    "narrow window": (MistralConfig(**SIZES, sliding_window=24), ["q_proj", "v_proj"]),
    "window shorter than a row": (MistralConfig(**SIZES, sliding_window=41), ["q_proj", "v_proj"]),
    "convolution": (
        Lfm2Config(**SIZES, layer_types=["full_attention", "conv", "full_attention"]),
        ["q_proj", "v_proj"],
    ),
    "rope by length": (
        LlamaConfig(
            **SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        ),
        ["q_proj", "v_proj"],
    ),
    "ALiBi": (FalconConfig(**{**SIZES, "alibi": True}), ["query_key_value"]),
}


def adapted(config, targets, root_std=0.5):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model = get_peft_model(model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    bayesify(model, init_root_std=root_std)
    return model


@pytest.fixture
def make(byte_level):
    """A posterior and batches of real prompts, by letter or in the expanded layout."""

    def make(name="llama", kind="letter", groups=((0, 1, 2), (1, 3), (2, 0, 3))):
        task = Task("ragged", ROWS, (), prompt=PROMPT)
        scorer = (
            LetterScorer(byte_level, task)
            if kind == "letter"
            else TextScorer(byte_level, task, layout=kind)
        )
        posterior = Gaussian(adapted(*{**MODELS, **UNFIT}[name]), scorer)
        batches = [scorer.collate(scorer.encode([ROWS[i] for i in group])) for group in groups]
        for batch in batches:
            batch.pop("labels")
        return posterior, batches

    return make


def last(model, batch):
    """Five logits at the end of each row."""
    return last_logits(model, batch, keep=1)[:, -1, :5]


def batch_of(*sequences):
    mask = left_padded([[1] * len(ids) for ids in sequences], 0)
    return {
        "input_ids": left_padded(sequences, 0),
        "attention_mask": mask,
        "position_ids": positions(mask),
    }


def plain(posterior, batch, draws):
    with without_common_prefix():
        return posterior.logits(batch, draws)


def same(ours, theirs, **close):
    present = theirs.isfinite()
    assert torch.equal(ours.isfinite(), present)
    assert_close(ours[present], theirs[present], **(close or CLOSE))


def passes(model):
    """The shapes (rows, tokens) of all passes through the blocks."""
    seen = []
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0].shape[:2]),
        with_kwargs=True,
    )
    return seen


def begin_of(batch):
    """How many tokens all rows of a letter-scored batch begin with, row by row in plain Python."""
    rows = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    length = 0
    while all(len(row) > length + 1 and row[length] == rows[0][length] for row in rows):
        length += 1
    return length


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["letter", "expanded"])
def test_the_logits_are_the_plain_ones(make, name, kind):
    posterior, batches = make(name, kind)
    draws, seen = Draws(12, seed=1), passes(posterior.model)
    for batch in (*batches, batches[0]):
        found, most = posterior.logits(batch, draws), max(seen)
        same(found, plain(posterior, batch, draws))
        assert found.std(0).nan_to_num().max() > 1e-2
        assert most[1] < batch["input_ids"].shape[1] - 20
        seen.clear()


@pytest.mark.parametrize("kind", ["letter", "expanded"])
def test_tokens_are_counted(make, kind):
    posterior, batches = make(kind=kind)
    seen, sizes = passes(posterior.model), [batch["input_ids"].shape for batch in batches]
    for batch in batches:
        posterior.logits(batch, Draws(12))
    (read, *rests), common = seen, seen[0][1]
    assert read[0] == 12
    assert [tuple(rest) for rest in rests] == [
        (12 * rows, tokens - common) for rows, tokens in sizes
    ]
    if kind == "letter":
        assert common == begin_of(batches[0]) > 20
    assert sum(a * b for a, b in seen) < 0.75 * sum(12 * a * b for a, b in sizes)


@pytest.mark.parametrize("name", UNFIT)
def test_other_models_are_left_as_they_are(make, name):
    posterior, batches = make(name)
    seen = passes(posterior.model)
    found = [posterior.logits(batch, Draws(12)) for batch in batches]
    whole = [(12 * len(batch["input_ids"]), batch["input_ids"].shape[1]) for batch in batches]
    tried = name in (
        "narrow window",
        "window shorter than a row",
        "convolution",
    )  # only what they keep shows it
    assert [tuple(shape) for shape in seen][tried:] == whole
    for batch, logits in zip(batches, found, strict=True):
        same(logits, plain(posterior, batch, Draws(12)))


def test_packed_texts_and_blocks_read_once_are_left_as_they_are(make, byte_level):
    posterior, batches = make(kind="packed")
    seen = passes(posterior.model)
    posterior.logits(batches[0], Draws(12))
    assert [tuple(shape) for shape in seen] == [(36, batches[0]["input_ids"].shape[1])]
    posterior, batches = make()
    model = posterior.model.unload()
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    bayesify(model, slots=Slots(model).names()[-1:])
    later, seen = Gaussian(model, posterior.scorer), passes(model)
    later.logits(batches[0], Draws(12))
    assert [tuple(shape) for shape in seen] == [(3, batches[0]["input_ids"].shape[1])]


@pytest.mark.parametrize("bounds", [{"max_rows": 9}, {"max_tokens": 700}, {"max_rows": 1}])
def test_bounds_hold_and_each_pass_reads_for_its_own_draws(make, bounds):
    posterior, batches = make()
    seen = passes(posterior.model)
    for batch in batches * 4:
        rows, tokens = batch["input_ids"].shape
        draws = Draws(7, **bounds)
        found = posterior.logits(batch, draws)
        step = draws.at_once(batch)
        assert step < 7
        assert max(a for a, _ in seen) <= step * rows
        assert max(a * b for a, b in seen) <= max(bounds.get("max_tokens", 0), step * rows * tokens)
        shapes = [tuple(shape) for shape in seen]
        seen.clear()
        same(found, plain(posterior, batch, Draws(7)))
        seen.clear()
    assert max(b for _, b in shapes) < tokens  # by then it is read


def test_later_draws_and_other_seeds_are_read_anew(make):
    posterior, (batch, other, _) = make()
    draws = Draws(12, seed=2, first=3)
    whole = plain(posterior, batch, Draws(15, seed=2))
    same(posterior.logits(batch, Draws(15, seed=2)), whole)
    same(posterior.logits(batch, draws), whole[3:])
    same(posterior.logits(batch, Draws(3, seed=2)), whole[:3])
    same(posterior.logits(other, Draws(12)), plain(posterior, other, Draws(12)))
    same(posterior.logits(other, Draws(12, seed=5)), plain(posterior, other, Draws(12, seed=5)))


def test_the_mean_reads_once_it_pays(make):
    posterior, batches = make()
    seen = passes(posterior.model)
    for _ in range(5):
        for batch in batches:
            found, shapes = posterior.logits(batch, Draws(0)), list(seen)
            same(found, plain(posterior, batch, Draws(0)))
            seen.clear()
            if len(shapes) == 2:
                (read, rest), length = shapes, begin_of(batch)
                assert (tuple(read), rest[1]) == (
                    (1, rest[1] and read[1]),
                    batch["input_ids"].shape[1] - read[1],
                )
                assert read[1] <= length
    assert len(shapes) == 1
    assert shapes[0][1] < batch["input_ids"].shape[1] - 20


def test_a_single_call_reads_only_if_that_saves_more_than_a_pass(make):
    posterior, (batch, *_) = make()
    seen, length, rows = passes(posterior.model), begin_of(batch), len(batch["input_ids"])
    most = common.PASS // (length * (rows - 1))  # draws that just do not pay
    posterior.logits(batch, Draws(most))
    assert len(seen) == 1
    seen.clear()
    posterior.logits(batch, Draws(most + 1))
    assert tuple(seen[0]) == (most + 1, length)


def test_single_rows_share_with_those_before(make):
    posterior, _ = make()
    scorer, seen, counts = posterior.scorer, passes(posterior.model), []
    for row in (*ROWS, *ROWS):
        batch = scorer.collate(scorer.encode([row]))
        batch.pop("labels")
        found = posterior.logits(batch, Draws(12))
        counts.append(len(seen))
        seen.clear()
        same(found, plain(posterior, batch, Draws(12)))
        seen.clear()
    assert sorted(counts) == [1] * 7 + [2]
    assert counts[0] == 1


def random_rows(*lengths, begin=()):
    generator = torch.Generator().manual_seed(sum(lengths))
    return [
        [*begin, *torch.randint(3, 400, (length,), generator=generator).tolist()]
        for length in lengths
    ]


def test_rows_without_a_common_beginning(make):
    posterior = Gaussian(make()[0].model, last)
    batch = batch_of(*random_rows(30, 12, 25, 9))
    seen = passes(posterior.model)
    found = posterior.logits(batch, Draws(12))
    assert [tuple(shape) for shape in seen] == [(48, 30)]
    same(found, plain(posterior, batch, Draws(12)))


@pytest.mark.parametrize("extra", [0, 1, 5])
def test_a_row_that_is_the_beginning_of_the_others_keeps_its_end(make, extra):
    posterior = Gaussian(make()[0].model, last)
    begin = random_rows(30)[0]
    batch = batch_of(*random_rows(11, 4, 7, begin=begin), [*begin, *[5] * extra])
    seen = passes(posterior.model)
    found = posterior.logits(batch, Draws(12))
    assert tuple(seen[0]) == (12, 29 if extra == 0 else 30)
    same(found, plain(posterior, batch, Draws(12)))


def test_rows_all_alike(make):
    posterior = Gaussian(make()[0].model, last)
    batch = batch_of(*[random_rows(30)[0]] * 4)
    seen = passes(posterior.model)
    found = posterior.logits(batch, Draws(12))
    assert [tuple(shape) for shape in seen] == [(12, 29), (48, 1)]
    same(found, plain(posterior, batch, Draws(12)))


def test_data_sets_after_each_other(make):
    posterior = Gaussian(make()[0].model, last)
    first, second = random_rows(30)[0], random_rows(40)[0]
    longer = [*first, *random_rows(50)[0]]
    seen, reads = passes(posterior.model), []
    for begin in (first, first, second, second, longer, longer, first, first[:20]):
        batch = batch_of(*random_rows(11, 4, 7, 8, begin=begin))
        found, shapes = posterior.logits(batch, Draws(12)), list(seen)
        same(found, plain(posterior, batch, Draws(12)))
        reads.append(shapes[0][1] if len(shapes) == 2 else 0)
        assert shapes[-1][1] == len(begin) + 11 - len(begin)
        seen.clear()
    assert reads == [30, 0, 40, 0, 80, 0, 0, 0]


def fused_step(model):
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in chosen:
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(chosen, lr=0.2, fused=True).step()


def through_data(model):
    Slots(model).weights()[Slots(model).names(("lora_B",))[0]].data.mul_(-1)


def base_weight(model):
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.weight.mul_(-1)


def base_weight_replaced(model):
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(-layer.weight.detach(), requires_grad=False)


def precision(model):
    model.to(torch.bfloat16).to(torch.float32)


def merged(model):
    model.merge_adapter()


def scaling(model):
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= -2


def disabled(model):
    model.base_model.disable_adapter_layers()


CHANGES = [
    fused_step,
    through_data,
    base_weight,
    base_weight_replaced,
    precision,
    merged,
    scaling,
    disabled,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("count", [0, 12])
def test_a_model_that_changes_between_batches_is_read_anew(make, change, count):
    posterior, batches = make()
    seen = passes(posterior.model)
    for batch in batches * 3:
        before = posterior.logits(batch, Draws(count))
    assert seen[-1][1] < batch["input_ids"].shape[1] - 20
    change(posterior.model)
    found = posterior.logits(batch, Draws(count))
    anew = Gaussian(posterior.model, posterior.scorer)  # whose draws cannot be held ones
    same(found, plain(anew, batch, Draws(count)))
    if not (change is merged and count == 0):  # merged, the mean is the same function
        assert not torch.allclose(
            found.nan_to_num(neginf=0), before.nan_to_num(neginf=0), atol=1e-3
        )


def test_what_was_read_serves_as_long_as_nothing_changes(make):
    posterior, batches = make()
    seen = passes(posterior.model)
    for batch in batches * 3:
        posterior.logits(batch, Draws(12))
    assert sum(shape[0] == 12 for shape in seen) == 1


def test_autocast_is_within_rounding_and_read_for_itself(make):
    posterior, batches = make()
    draws, seen, reads = Draws(12), passes(posterior.model), []
    apart = Gaussian(posterior.model, posterior.scorer)
    for bf16 in (False, True, True, False):
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            found = [posterior.logits(batch, draws).float() for batch in batches]
            reads.append(sum(shape[0] == 12 for shape in seen))
            theirs = [plain(apart, batch, draws).float() for batch in batches]
        for ours, other, batch in zip(found, theirs, batches, strict=True):
            exact = plain(apart, batch, draws)
            if bf16:
                off = [
                    (logits - exact)[exact.isfinite()].square().mean().sqrt()
                    for logits in (ours, other)
                ]
                assert 0 < off[0] < 1.2 * off[1] < 0.5
            else:
                same(ours, exact)
    assert reads == [1, 1, 0, 1]


def test_only_as_much_is_kept_as_the_bound_allows(make, monkeypatch):
    of_token = 12 * 3 * 2 * 2 * 8 * 4  # draws, layers, keys and values, heads, width, bytes
    posterior, batches = make()
    seen = passes(posterior.model)
    for tokens in (20, common.LEAST - 1, 0):
        monkeypatch.setattr(common, "MAX_BYTES", of_token * tokens + 17)
        posterior._plan.common = kept = CommonPrefix()
        for i, batch in enumerate(batches):
            seen.clear()
            found, shapes = posterior.logits(batch, Draws(12)), list(seen)
            same(found, plain(posterior, batch, Draws(12)))
            rest = batch["input_ids"].shape[1] - (tokens if tokens >= common.LEAST else 0)
            assert shapes[-1][1] == rest
            assert len(shapes) == (2 if i == 0 else 1)
        assert (
            sum(value.nbytes for layer in kept._kept.layers for value in layer) <= common.MAX_BYTES
        )


def forms(posterior):
    model, score = posterior.model, posterior.scorer
    weights = Slots(model).weights()
    torch.manual_seed(3)
    ones = {name: torch.full_like(w, 0.02) for name, w in weights.items()}
    deviations = {name: 0.2 * torch.randn(3, *w.shape) for name, w in weights.items()}
    ranks = {name: torch.full((len(weights[name]), 1), 0.5) for name in Slots(model).names()}
    blocks = {name: Diagonal(torch.full_like(w, 20.0)) for name, w in weights.items()}
    yield Scaled(model, score, ranks)
    yield LowRank(model, score, ones, deviations)
    yield Sampled(model, score, blocks, prior_precision=5.0)
    yield Tempered(posterior, 2.0)
    yield Point(model, score)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj", "v_proj"]))
    for name, slot in Slots(model, "other").modules().items():
        nn.init.normal_(slot.weight, std=0.2 if name.endswith("A") else 0.3)
    yield Mixture([posterior, Point(model, score, adapter="other")])


def test_every_form_gives_the_plain_logits(make):
    posterior, batches = make()
    seen, kinds = passes(posterior.model), 0
    for form in forms(posterior):
        shorter = 0
        for batch in batches * 3:
            seen.clear()
            found = form.logits(batch, Draws(12))
            shorter += max(seen)[1] < batch["input_ids"].shape[1]
            same(found, plain(form, batch, Draws(12)))
        assert shorter >= 3, form
        kinds += 1
    assert kinds == 6


def test_scorers_that_ask_for_something_else_are_left_as_they_are(make):
    model = make()[0].model
    batch = batch_of(*random_rows(11, 4, 7, 8, begin=random_rows(30)[0]))
    ids, mask, places = batch["input_ids"], batch["attention_mask"], batch["position_ids"]
    right = mask.flip(1)
    asks = {
        "all logits": {"attention_mask": mask, "position_ids": places},
        "hidden states": {
            "attention_mask": mask,
            "position_ids": places,
            "logits_to_keep": 1,
            "output_hidden_states": True,
        },
        "a cache": {
            "attention_mask": mask,
            "position_ids": places,
            "logits_to_keep": 1,
            "use_cache": True,
        },
        "places by the model": {"attention_mask": mask, "logits_to_keep": 1},
        "padding on the right": {
            "attention_mask": right,
            "position_ids": places,
            "logits_to_keep": 1,
        },
        "positions that differ": {"position_ids": places, "logits_to_keep": 1},
    }
    for name, ask in asks.items():

        def score(model, batch, ask=ask):
            names = set(ask) & set(batch)
            return model(
                input_ids=batch["input_ids"], **{**ask, **{n: batch[n] for n in names}}
            ).logits[:, -1, :5]

        seen, rows = passes(model), {**batch, "attention_mask": ask.get("attention_mask", mask)}
        Gaussian(model, score).logits(rows, Draws(12))
        assert [tuple(shape) for shape in seen] == [(48, ids.shape[1])], name


def test_padding_that_the_model_would_count_is_left_to_it(make):
    def score(model, batch):
        return model(**batch, logits_to_keep=1).logits[:, -1, :5]

    posterior = Gaussian(make()[0].model, score)
    ids = torch.tensor(random_rows(8, 8, 8, 8, begin=[0, 0, 0, *random_rows(30)[0]]))
    batch, seen = {"input_ids": ids, "attention_mask": (ids > 0).long()}, passes(posterior.model)
    found = posterior.logits(batch, Draws(12))
    same(found, plain(posterior, batch, Draws(12)))
    assert {tuple(shape) for shape in seen} == {(48, 41)}


def test_no_mask_and_no_positions_where_nothing_is_padded(make):
    def score(model, batch):
        return model(input_ids=batch["input_ids"], logits_to_keep=1).logits[:, -1, :5]

    for name in ("llama", "gpt2"):
        posterior = Gaussian(make(name)[0].model, score)
        batch = {"input_ids": torch.tensor(random_rows(8, 8, 8, 8, begin=random_rows(30)[0]))}
        seen = passes(posterior.model)
        found = posterior.logits(batch, Draws(12))
        assert [tuple(shape) for shape in seen] == [(12, 30), (48, 8)]
        same(found, plain(posterior, batch, Draws(12)))


def test_passes_with_gradients_are_left_as_they_are(make):
    model = make()[0].model
    batch = batch_of(*random_rows(11, 4, 7, 8, begin=random_rows(300)[0]))
    seen = passes(model)
    with CommonPrefix.of_mean(model).sharing(model):
        last(model, batch).sum().backward()
    assert [tuple(shape) for shape in seen] == [(4, 311)]
    assert all(slot.weight.grad is not None for slot in Slots(model).modules().values())


def test_what_was_read_goes_with_the_model(make):
    posterior, batches = make()
    for batch in batches * 3:
        posterior.logits(batch, Draws(0))
    kept = weakref.ref(common._OF_MEANS[posterior.model]._kept)
    assert kept() is not None
    model = weakref.ref(posterior.model)
    del posterior
    gc.collect()
    assert model() is None
    assert kept() is None
