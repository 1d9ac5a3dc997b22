"""Tokens that all rows begin with are read once for each draw, and never a stale one."""

import gc
import weakref
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import (
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
)

from bayestune.adapters import Slots, bayesify
from bayestune.forward import Batch, Draws
from bayestune.forward import common_prefix as common
from bayestune.forward.common_prefix import CommonPrefix, without_common_prefix
from bayestune.posteriors import Gaussian, Posterior
from bayestune.scoring.last_logits import last_logits
from bayestune.scoring.tokens import left_padded, positions
from tiny import CAUSAL, CLOSE, RAGGED, WIDE, adapted, causal, converted, passes, ragged_batches

OPT = {**WIDE, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}
FIT = CAUSAL | {
    "mistral": MistralConfig(**WIDE, sliding_window=None),
    "mistral, wide window": MistralConfig(**WIDE, sliding_window=300),
    "gemma2": Gemma2Config(**WIDE, head_dim=8, sliding_window=300),
    "opt": OPTConfig(**OPT, do_layer_norm_before=True),
    "neox": GPTNeoXConfig(**WIDE),
}
BY_LENGTH = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
SOME_CONVOLVE = ["full_attention", "conv", "full_attention"]
UNFIT = {  # their tokens go by more than keys, values and position ids
    "narrow window": MistralConfig(**WIDE, sliding_window=24),
    "window shorter than a row": MistralConfig(**WIDE, sliding_window=41),
    "convolution": Lfm2Config(**WIDE, layer_types=SOME_CONVOLVE),
    "rope by length": LlamaConfig(**WIDE, rope_parameters=BY_LENGTH),
    "ALiBi": FalconConfig(**{**WIDE, "alibi": True}),
}
TRIED = ("narrow window", "window shorter than a row", "convolution")  # what is read shows it
GROUPS = [(0, 1, 2), (1, 3), (2, 0, 3)]


@pytest.fixture
def make(byte_level):
    """Makes a posterior and three batches of prompts that begin with the same example."""

    def make(name: str = "llama", kind: str = "letter") -> tuple[Gaussian, list[Batch]]:
        scorer, batches = ragged_batches(byte_level, kind, GROUPS)
        return Gaussian(converted(causal((FIT | UNFIT)[name])), scorer), batches

    return make


@pytest.fixture
def of_rows() -> Gaussian:
    """A posterior that is asked for five logits at the end of each row."""

    def last(model: nn.Module, batch: Batch) -> torch.Tensor:
        return last_logits(model, batch, keep=1)[:, -1, :5]

    return Gaussian(converted(causal(CAUSAL["llama"])), last)


def random_rows(*lengths: int, begin: Sequence[int] = ()) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(3, 400, (length,), generator=generator) for length in lengths]
    return [[*begin, *row.tolist()] for row in rows]


BEGIN = random_rows(30)[0]


def batch_of(*sequences: Sequence[int]) -> dict[str, torch.Tensor]:
    mask = left_padded([[1] * len(ids) for ids in sequences], 0)
    ids = left_padded(sequences, 0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}


def plain(posterior: Posterior, batch: Batch, draws: Draws) -> torch.Tensor:
    with without_common_prefix():
        return posterior.logits(batch, draws)


def same_as_plain(
    posterior: Gaussian, batch: Batch, draws: Draws, seen: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Checks the logits; the shapes (rows, tokens) of the passes that they took."""
    seen.clear()
    found = posterior.logits(batch, draws)
    shapes = list(seen)
    assert_close(found, plain(posterior, batch, draws), **CLOSE)
    return shapes


def begin_of(batch: Batch) -> int:
    """How many tokens all rows begin with, in plain Python, without their last one."""
    pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    rows = [ids[mask.bool()].tolist()[:-1] for ids, mask in pairs]
    length = 0
    for tokens in zip(*rows, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


# The same logits from fewer tokens


@pytest.mark.parametrize("name", FIT)
@pytest.mark.parametrize("kind", ["letter", "expanded"])
def test_the_logits_are_the_plain_ones(make, name, kind):
    posterior, batches = make(name, kind)
    seen = passes(posterior.model)
    for batch in (*batches, batches[0]):
        shapes = same_as_plain(posterior, batch, Draws(12, seed=1), seen)
        assert max(shapes)[1] < batch["input_ids"].shape[1] - 20
    assert posterior.logits(batch, Draws(12)).nan_to_num(neginf=0).std(0).max() > 1e-2


@pytest.mark.parametrize("kind", ["letter", "expanded"])
def test_the_beginning_is_read_once_and_then_the_rest_of_each_row(make, kind):
    posterior, batches = make(kind=kind)
    seen = passes(posterior.model)
    sizes = [batch["input_ids"].shape for batch in batches]
    for batch in batches:
        posterior.logits(batch, Draws(12))
    read, *rests = seen
    length = read[1]
    assert read == (12, length)
    assert rests == [(12 * rows, tokens - length) for rows, tokens in sizes]
    if kind == "letter":
        assert length == begin_of(batches[0]) > 20
    taken = sum(rows * tokens for rows, tokens in seen)
    assert taken < 0.75 * 12 * sum(rows * tokens for rows, tokens in sizes)


@pytest.mark.parametrize("bounds", [{"max_rows": 9}, {"max_tokens": 700}, {"max_rows": 1}])
def test_bounds_hold_and_each_pass_reads_for_its_own_draws(make, bounds):
    posterior, batches = make()
    seen = passes(posterior.model)
    draws = Draws(7, **bounds)
    for batch in batches * 4:
        rows, tokens = batch["input_ids"].shape
        step = draws.at_once(batch)
        assert step < 7
        shapes = same_as_plain(posterior, batch, draws, seen)
        assert max(count for count, _ in shapes) <= step * rows
        assert max(a * b for a, b in shapes) <= step * rows * tokens
    assert max(length for _, length in shapes) < tokens  # by then it is read


def test_autocast_is_within_rounding_and_reads_for_itself(make):
    posterior, (batch, *_) = make()
    seen = passes(posterior.model)
    exact = plain(posterior, batch, Draws(12))

    def off(logits: torch.Tensor) -> torch.Tensor:
        return (logits.float() - exact)[exact.isfinite()].square().mean().sqrt()

    reads = []
    for bf16 in (False, True, True, False):
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            found = posterior.logits(batch, Draws(12))
            reads.append(len(seen) - 1)
            usual = off(plain(posterior, batch, Draws(12)))
        if bf16:
            assert 0 < off(found) < 1.2 * usual < 0.5
        else:
            assert_close(found, exact, **CLOSE)
    assert reads == [1, 1, 0, 1]


# When it pays


def test_the_mean_reads_once_it_pays(make):
    posterior, batches = make()
    seen = passes(posterior.model)
    reads = 0
    for batch in batches * 5:
        shapes = same_as_plain(posterior, batch, Draws(0), seen)
        if len(shapes) == 2:
            reads += 1
            (size, length), (_, rest) = shapes
            assert size == 1
            assert length <= begin_of(batch)
            assert rest == batch["input_ids"].shape[1] - length
    assert reads >= 1
    assert len(shapes) == 1
    assert shapes[0][1] < batch["input_ids"].shape[1] - 20


def test_a_single_call_reads_only_if_that_saves_more_than_a_pass(make):
    posterior, (batch, *_) = make()
    length = begin_of(batch)
    most = common.PASS // (length * (len(batch["input_ids"]) - 1))  # draws that just do not pay
    seen = passes(posterior.model)
    posterior.logits(batch, Draws(most))
    assert len(seen) == 1
    seen.clear()
    posterior.logits(batch, Draws(most + 1))
    assert seen[0] == (most + 1, length)


def test_single_rows_share_with_those_before(make):
    posterior, _ = make()
    seen = passes(posterior.model)
    counts = []
    for row in RAGGED * 2:
        batch = posterior.scorer.collate(posterior.scorer.encode([row]))
        batch.pop("labels")
        counts.append(len(same_as_plain(posterior, batch, Draws(12), seen)))
    assert counts[0] == 1
    assert sorted(counts) == [1] * 7 + [2]


# Which tokens


@pytest.mark.parametrize(
    ("rows", "shapes"),
    [
        (random_rows(30, 12, 25, 9), [(48, 30)]),
        ([*random_rows(11, 4, 7, begin=BEGIN), BEGIN], [(12, 29), (48, 12)]),
        ([*random_rows(11, 4, 7, begin=BEGIN), [*BEGIN, 5]], [(12, 30), (48, 11)]),
        ([*random_rows(11, 4, 7, begin=BEGIN), [*BEGIN, *[5] * 5]], [(12, 30), (48, 11)]),
        ([BEGIN] * 4, [(12, 29), (48, 1)]),
    ],
    ids=["nothing in common", "a row is it", "one more token", "five more", "all alike"],
)
def test_each_row_keeps_a_token_of_its_own(rows, shapes, of_rows):
    seen = passes(of_rows.model)
    assert same_as_plain(of_rows, batch_of(*rows), Draws(12), seen) == shapes


def test_what_is_kept_serves_shorter_beginnings_and_gives_way_to_others(of_rows):
    seen = passes(of_rows.model)
    other = random_rows(40)[0]
    longer = [*BEGIN, *random_rows(50)[0]]
    reads = []
    for begin in (BEGIN, BEGIN, other, other, longer, longer, BEGIN, BEGIN[:20]):
        batch = batch_of(*random_rows(11, 4, 7, 8, begin=begin))
        *read, rest = same_as_plain(of_rows, batch, Draws(12), seen)
        reads.append(read[0][1] if read else 0)
        assert rest == (48, 11)
    assert reads == [30, 0, 40, 0, 80, 0, 0, 0]


def test_only_as_much_is_kept_as_the_bound_allows(make, monkeypatch):
    of_token = 12 * 3 * 2 * 2 * 8 * 4  # draws, layers, keys and values, heads, width, bytes
    posterior, batches = make()
    seen = passes(posterior.model)
    for tokens in (20, common.LEAST - 1, 0):
        monkeypatch.setattr(common, "MAX_BYTES", of_token * tokens + 17)
        fresh = Gaussian(posterior.model, posterior.scorer)
        known = tokens if tokens >= common.LEAST else 0
        for i, batch in enumerate(batches):
            shapes = same_as_plain(fresh, batch, Draws(12), seen)
            assert len(shapes) == (2 if i == 0 else 1)
            assert shapes[-1][1] == batch["input_ids"].shape[1] - known


# What is left as it is


@pytest.mark.parametrize("name", UNFIT)
def test_models_whose_tokens_go_by_more_than_position_are_left_as_they_are(make, name):
    posterior, batches = make(name)
    seen = passes(posterior.model)
    shapes = []
    for batch in batches:
        shapes += same_as_plain(posterior, batch, Draws(12), seen)
    rows = [batch["input_ids"].shape for batch in batches]
    assert shapes[name in TRIED :] == [(12 * count, tokens) for count, tokens in rows]


def test_packed_texts_and_blocks_that_run_once_are_left_as_they_are(make):
    posterior, (batch, *_) = make(kind="packed")
    tokens = batch["input_ids"].shape[1]
    assert same_as_plain(posterior, batch, Draws(12), passes(posterior.model)) == [(36, tokens)]
    posterior, (batch, *_) = make()
    model = adapted(posterior.model.unload())
    bayesify(model, init_root_std=0.5, slots=Slots(model).names()[-1:])
    later = Gaussian(model, posterior.scorer)
    tokens = batch["input_ids"].shape[1]
    assert same_as_plain(later, batch, Draws(12), passes(model)) == [(3, tokens)]


ASKED = {
    "all logits": {"logits_to_keep": 0},
    "hidden states": {"output_hidden_states": True},
    "a cache": {"use_cache": True},
    "positions by the model": {"position_ids": None},
    "positions that differ": {"attention_mask": None},
}


@pytest.mark.parametrize("name", ASKED)
def test_scorers_that_ask_for_something_else_are_left_as_they_are(name, of_rows):
    def score(model: nn.Module, batch: Batch) -> torch.Tensor:
        return model(**{**batch, "logits_to_keep": 1, **ASKED[name]}).logits[:, -1, :5]

    posterior = of_rows.on(score)
    batch = batch_of(*random_rows(11, 4, 7, 8, begin=BEGIN))
    assert same_as_plain(posterior, batch, Draws(12), passes(posterior.model)) == [(48, 41)]


def test_padding_on_the_right_and_padding_the_model_counts_are_left_as_they_are(of_rows):
    right = batch_of(*random_rows(11, 4, 7, 8, begin=BEGIN))
    right["attention_mask"] = right["attention_mask"].flip(1)
    ids = torch.tensor(random_rows(8, 8, 8, 8, begin=[0, 0, 0, *BEGIN]))
    counted = {"input_ids": ids, "attention_mask": (ids > 0).long()}

    def score(model: nn.Module, batch: Batch) -> torch.Tensor:
        return model(**batch, logits_to_keep=1).logits[:, -1, :5]

    for batch in (right, counted):
        posterior = of_rows.on(score)
        assert same_as_plain(posterior, batch, Draws(12), passes(posterior.model)) == [(48, 41)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_mask_and_no_positions_are_fine_where_nothing_is_padded(name):
    def score(model: nn.Module, batch: Batch) -> torch.Tensor:
        return model(input_ids=batch["input_ids"], logits_to_keep=1).logits[:, -1, :5]

    posterior = Gaussian(converted(causal(CAUSAL[name])), score)
    batch = {"input_ids": torch.tensor(random_rows(8, 8, 8, 8, begin=BEGIN))}
    seen = passes(posterior.model)
    assert same_as_plain(posterior, batch, Draws(12), seen) == [(12, 30), (48, 8)]


def test_passes_with_gradients_are_left_as_they_are(of_rows):
    model = of_rows.model
    batch = batch_of(*random_rows(11, 4, 7, 8, begin=random_rows(300)[0]))
    seen = passes(model)
    with CommonPrefix.of_mean(model).sharing(model):
        of_rows.scorer(model, batch).sum().backward()
    assert seen == [(4, 311)]
    assert all(slot.weight.grad is not None for slot in Slots(model).modules().values())


# Never a stale one


def fused_step(model: nn.Module) -> None:
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in chosen:
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(chosen, lr=0.2, fused=True).step()


def base_weight(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.weight.mul_(-1)


def scaling(model: nn.Module) -> None:
    for layer in Slots(model).layers.values():
        layer.scaling["default"] *= -2


@pytest.mark.parametrize("change", [fused_step, base_weight, scaling])
@pytest.mark.parametrize("count", [0, 12])
def test_a_model_that_changes_between_batches_is_read_anew(make, change, count):
    posterior, batches = make()
    seen = passes(posterior.model)
    for batch in batches * 3:
        before = posterior.logits(batch, Draws(count))
    assert seen[-1][1] < batch["input_ids"].shape[1] - 20
    change(posterior.model)
    found = posterior.logits(batch, Draws(count))
    anew = Gaussian(posterior.model, posterior.scorer)  # whose draws cannot be kept ones
    assert_close(found, plain(anew, batch, Draws(count)), **CLOSE)
    assert not torch.allclose(found, before, atol=1e-3)


def test_what_was_read_goes_with_the_model(make):
    posterior, batches = make()
    seen = passes(posterior.model)
    for batch in batches * 3:
        posterior.logits(batch, Draws(0))
    assert any(rows == 1 for rows, _ in seen)
    model = weakref.ref(posterior.model)
    del posterior
    gc.collect()
    assert model() is None
