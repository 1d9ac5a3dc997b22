"""Draws reach the layers, each its own rows; or they are refused with the reason."""

import copy
import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from bayestune import Refusal
from bayestune.adapters import Arrivals, DrawnLinear, Slots, bayesify, drawn
from bayestune.curvature import gauss_newton
from bayestune.forward import Batch, Draws
from bayestune.forward import common_prefix as common
from bayestune.forward.verdicts import Verdicts, agrees
from bayestune.posteriors import (
    Dropout,
    Gaussian,
    Linearised,
    Point,
    TokenNoise,
    export_draw,
    predict,
    save_posterior,
)
from bayestune.scoring import TextScorer
from bayestune.scoring.last_logits import last_logits
from bayestune.scoring.text import can_pack
from tiny import (
    BATCH,
    CAUSAL,
    CLOSE,
    SIZES,
    TARGETS,
    adapted,
    causal,
    coloured_questions,
    converted,
    end_logits,
    one_by_one,
    passes,
    randomised,
    tiny_bert,
    tiny_llama,
)

QUERIES = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
LONG = {**SIZES, "num_hidden_layers": 3, "max_position_embeddings": 128}


def class_logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).logits


@pytest.fixture
def posterior() -> Gaussian:
    return Gaussian(converted(tiny_llama(lora_dropout=0.1)), end_logits)


def posteriors(model: nn.Module) -> list[Any]:
    """One of each kind of pass."""
    return [Gaussian(model, end_logits), Dropout(model, end_logits), TokenNoise(model, end_logits)]


# Draws that reach nothing


@pytest.mark.parametrize("place", range(3))
def test_an_adapter_that_is_switched_off_is_refused(place):
    model = converted(tiny_llama(), lora_dropout=0.1)
    posterior = posteriors(model)[place]
    before = posterior.logits(BATCH, Draws(3))
    with model.disable_adapter(), pytest.raises(ValueError, match=r"disabled.*leave disable_adap"):
        posterior.logits(BATCH, Draws(3))
    with model.disable_adapter(), pytest.raises(ValueError, match="not use the adapter 'default'"):
        posterior.logits(BATCH, Draws(0))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into the weights.*unmerge_adapter"):
        posterior.logits(BATCH, Draws(3))
    assert_close(posterior.logits(BATCH, Draws(0))[0], end_logits(model, BATCH), **CLOSE)
    model.unmerge_adapter()
    assert_close(posterior.logits(BATCH, Draws(3)), before, rtol=1e-3, atol=1e-3)


def test_one_layer_that_is_switched_off_is_refused(posterior):
    layer = list(Slots(posterior.model).layers.values())[-1]
    layer.enable_adapters(enabled=False)
    with pytest.raises(ValueError, match=r"disabled in model.layers.1.self_attn.v_proj"):
        posterior.logits(BATCH, Draws(3))


def test_an_adapter_that_was_merged_and_taken_off_is_refused(posterior):
    posterior.logits(BATCH, Draws(2))
    merged = posterior.model.merge_and_unload()
    with pytest.raises(ValueError, match=r"no layer .* holds the adapter 'default' \(any more\)"):
        posterior.logits(BATCH, Draws(2))
    assert merged is posterior.model.get_base_model()


def test_an_adapter_that_is_not_active_on_a_model_without_peft_is_refused():
    config = LoraConfig(target_modules=TARGETS)
    model = inject_adapter_in_model(config, tiny_llama(), "own")
    bayesify(randomised(model))
    own = Gaussian(model, end_logits)
    assert own.logits(BATCH, Draws(3)).std(0).max() > 0
    inject_adapter_in_model(config, model, "other")
    for layer in Slots(model, "own").layers.values():
        layer.set_adapter("other")
    with pytest.raises(ValueError, match=r"\['other'\] active; call set_adapter\('own'\)"):
        own.logits(BATCH, Draws(3))


@pytest.mark.parametrize("count", [0, 3])
def test_a_prediction_inside_drawn_is_refused(posterior, count):
    weights = {name: value[None] for name, value in posterior.draw(0).items()}
    expected = posterior.logits(BATCH, Draws(count))
    with drawn(posterior.model, weights), pytest.raises(ValueError, match="inside drawn"):
        posterior.logits(BATCH, Draws(count))
    assert_close(posterior.logits(BATCH, Draws(count)), expected, **CLOSE)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda p, folder: p.model.save_pretrained(folder), "not saved inside drawn"),
        (lambda p, folder: p.model.state_dict(), "not saved inside drawn"),
        (save_posterior, "a save inside drawn"),
        (lambda p, folder: save_posterior(p.model, folder), "a save inside drawn"),
        (lambda p, folder: export_draw(p, 0, folder), "a draw or a save inside drawn"),
        (lambda p, folder: copy.deepcopy(p.model), "not copied inside drawn"),
        (lambda p, folder: p.model.merge_adapter(), "not merged inside drawn"),
        (lambda p, folder: p.model.merge_and_unload(), "not merged inside drawn"),
    ],
)
def test_what_would_take_a_draw_for_the_adapter_is_refused(posterior, tmp_path, act, said):
    """PEFT's own save would leave A out, in silence; the posterior is the same afterwards."""
    before = posterior.logits(BATCH, Draws(2))
    weights = {name: weight[None] for name, weight in posterior.draw(0).items()}
    with drawn(posterior.model, weights), pytest.raises(Refusal, match=said):
        act(posterior, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert torch.equal(posterior.logits(BATCH, Draws(2)), before)
    act(posterior, tmp_path)


@pytest.mark.parametrize("uneven", [False, True])
def test_draws_of_another_shape_are_refused(posterior, uneven):
    weights = posterior.draw(0)
    if uneven:
        weights = {name: weight[None] for name, weight in weights.items()}
        first = next(iter(weights))
        weights[first] = weights[first].expand(2, -1, -1)
    refused = pytest.raises(Refusal, match=r"a single draw is weight\[None\]")
    with refused, drawn(posterior.model, weights):
        pass


def test_hotswapped_weights_are_refused(posterior, tmp_path):
    adapted(tiny_llama()).save_pretrained(tmp_path)
    hotswap_adapter(posterior.model, str(tmp_path), "default")
    with pytest.raises(ValueError, match=r"has lost its noise: .* of 0 .*hotswap_adapter"):
        posterior.logits(BATCH, Draws(3))


def test_kernels_that_pass_the_slots_by_are_refused(posterior, monkeypatch):
    for layer in Slots(posterior.model).layers.values():
        monkeypatch.setattr(layer, "forward", layer.base_layer.forward)
    with pytest.raises(ValueError, match="fused or quantised kernel"):
        posterior.logits(BATCH, Draws(3))


def test_weights_that_a_model_never_used_are_refused_by_drawn(posterior):
    weights = {name: value[None] for name, value in posterior.draw(0).items()}
    with (
        pytest.raises(
            ValueError, match=r"reach nothing: .*are disabled in .*leave disable_adapter"
        ),
        drawn(posterior.model, weights),
        posterior.model.disable_adapter(),  # left before drawn() is
    ):
        end_logits(posterior.model, BATCH)
    with drawn(posterior.model, weights):
        pass  # not called: nothing to say


class Experts(nn.Module):
    """Two experts; which rows go to which is decided by their first number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        mixed = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            chosen = (hidden[..., 0] > 0) == bool(number)
            if chosen.any():
                mixed[chosen] = expert(hidden[chosen])
        return self.last(mixed)


def experts(targets: list[str]) -> Gaussian:
    model = get_peft_model(Experts(), LoraConfig(r=2, target_modules=targets))
    bayesify(randomised(model), init_root_std=0.7)
    return Gaussian(model, lambda model, batch: model(batch["x"]))


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_experts_see_their_own_draw(rows):
    posterior = experts(["first", "0", "1"])
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        batch = {"x": torch.randn(rows, 6, generator=generator)}
        for draws in (Draws(2), Draws(4)):
            expected = one_by_one(posterior, batch, draws)
            assert_close(posterior.logits(batch, draws), expected, **CLOSE)


def test_experts_that_no_row_uses_are_named_once(caplog):
    posterior = experts(["0", "1"])
    batch = {"x": torch.ones(1, 6)}
    caplog.clear()
    with caplog.at_level(logging.WARNING, "bayestune"):
        for _ in range(3):
            posterior.logits(batch, Draws(1))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "1 of the adapter's 2 slots were not called" in said[0]


# Rows


def time_major(**changes: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
    config = XLNetConfig(**{**sizes, "num_labels": 3, **changes})
    model = XLNetForSequenceClassification(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return converted(model, target_modules=["layer_1"], task_type="SEQ_CLS")


@pytest.mark.parametrize("tokens", [5, 6, 9, 12, 18])
def test_time_before_rows_is_never_mixed(tokens):
    """Whether or not the tokens could be taken for S·N rows, in whatever order batches come."""
    posterior = Gaussian(time_major(), class_logits)
    for length in (tokens, 12, 7):
        batch = {"input_ids": torch.arange(3, 3 + 2 * length).reshape(2, length) % 64}
        for draws in (Draws(3), Draws(6)):
            expected = one_by_one(posterior, batch, draws)
            assert expected.std(0).max() > 1e-2
            assert_close(posterior.logits(batch, draws), expected, **CLOSE)


def test_drawn_refuses_rows_that_are_not_the_models():
    posterior = Gaussian(time_major(), class_logits)
    stacks = {n: torch.stack([posterior.draw(i)[n] for i in range(3)]) for n in posterior.draw(0)}
    batch = {"input_ids": torch.arange(3, 33).reshape(6, 5)}
    with drawn(posterior.model, stacks), pytest.raises(ValueError, match="got 5 rows, expected t"):
        class_logits(posterior.model, batch)


def test_a_layer_takes_rows_tokens_of_rows_and_nothing_else():
    arrivals = Arrivals(2, rows=6)
    layer = DrawnLinear(torch.randn(2, 4, 8), "q", arrivals)
    assert layer(torch.randn(6, 5, 8)).shape == (6, 5, 4)
    assert layer(torch.randn(30, 8)).shape == (30, 4)
    for leading in (0, 3, 5, 8, 12, 31):
        with pytest.raises(ValueError, match=f"got {leading} rows, expected the pass's 6"):
            layer(torch.randn(leading, 8))


def test_a_single_draw_is_a_plain_map_of_any_shape():
    weight = torch.randn(4, 8)
    layer = DrawnLinear(weight[None])
    for shape in ((8,), (3, 8), (1, 7, 8), (2, 3, 5, 8)):
        x = torch.randn(shape)
        assert_close(layer(x), x @ weight.T)


def decoder_classifier(**lora: Any) -> Gaussian:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**LONG, num_labels=3))
    return Gaussian(converted(model, task_type="SEQ_CLS", **lora), class_logits)


@pytest.mark.parametrize("rows", [1, 2, 3, 20])
def test_a_row_in_a_row_out(rows):
    posterior = decoder_classifier(layers_to_transform=[2])
    batch = {"input_ids": torch.randint(3, 400, (rows, 7))}
    for draws in (Draws(10), Draws(7, max_rows=4 * rows)):
        expected = one_by_one(posterior, batch, draws)
        assert_close(posterior.logits(batch, draws), expected, **CLOSE)
    assert predict(posterior, batch, 10).probabilities.shape == (rows, 3)


def test_scorers_that_lose_the_rows_are_refused(posterior):
    flat = posterior.on(lambda model, batch: end_logits(model, batch)[:, 0])
    with pytest.raises(ValueError, match=r"class logits \(N, C\): got \(2,\)"):
        flat.logits(BATCH, Draws(3))
    with pytest.raises(ValueError, match=r"class logits \(N, C\): got \(2,\)"):
        flat.logits(BATCH, Draws(0))


def test_one_logit_is_refused(posterior):
    one = posterior.on(lambda model, batch: end_logits(model, batch)[:, :1])
    with pytest.raises(ValueError, match=r"one logit .*\(3, 2, 1\), expected two classes .*num_la"):
        predict(one, BATCH, 3)
    assert one.logits(BATCH, Draws(3)).shape == (3, 2, 1)


def test_scorers_may_run_the_rows_in_parts(posterior):
    def in_parts(model: nn.Module, batch: Batch) -> Tensor:
        return torch.cat(
            [end_logits(model, {"input_ids": ids[None]}) for ids in batch["input_ids"]]
        )

    parts = posterior.on(in_parts)
    assert_close(parts.logits(BATCH, Draws(3)), posterior.logits(BATCH, Draws(3)), **CLOSE)


# The comparison


def test_draws_are_compared_once_for_a_kind_of_batch(posterior):
    shapes = passes(posterior.model)
    posterior.logits(BATCH, Draws(3))
    assert shapes == [(6, 12), (2, 12)]
    for batch in (BATCH, {"input_ids": BATCH["input_ids"][:, :9]}):
        shapes.clear()
        posterior.logits(batch, Draws(3))
        assert shapes == [(6, batch["input_ids"].shape[1])]
    shapes.clear()
    posterior.logits({"input_ids": BATCH["input_ids"][:, :5]}, Draws(3))  # half as long
    assert shapes == [(6, 5), (2, 5)]
    shapes.clear()
    other = Gaussian(posterior.model, end_logits)  # the verdict is the model's
    other.logits(BATCH, Draws(3))
    assert shapes == [(6, 12)]


def test_ways_that_are_found_wrong_are_not_taken_again(caplog):
    posterior = Gaussian(time_major(), class_logits)
    batch = {"input_ids": torch.arange(3, 13).reshape(2, 5)}
    caplog.clear()
    with caplog.at_level(logging.WARNING, "bayestune"):
        posterior.logits(batch, Draws(3))
        calls = []
        posterior.model.register_forward_pre_hook(lambda *_: calls.append(1))
        posterior.logits(batch, Draws(3))
    assert len(calls) == 3
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "XLNetForSequenceClassification runs one draw at a time" in said[0]


def test_draws_that_hardly_differ_decide_nothing(posterior):
    logits = torch.randn(1, 4, 3).expand(5, -1, -1)
    assert agrees(logits, logits[2], 2, posterior.model) is None
    noisy = logits + torch.randn(5, 4, 3)
    assert agrees(noisy, noisy[2], 2, posterior.model) is True
    assert agrees(noisy, noisy[1], 2, posterior.model) is False
    assert agrees(noisy, noisy[2, :2], 2, posterior.model) is False
    off = noisy[2] + 0.005 * noisy.std(0)
    assert agrees(noisy, off, 2, posterior.model) is True
    assert agrees(noisy, noisy[2] + 0.05, 2, posterior.model) is False


@pytest.mark.parametrize("what", ["one draw's", "by size", "another's"])
def test_rounding_beyond_the_usual_does_not_condemn_a_pass(posterior, what):
    """What is large beside one draw's few logits; what a batch's size changes, as on GPUs."""
    model = posterior.model.bfloat16()
    one = {"input_ids": BATCH["input_ids"][:1]}
    size = posterior.on(end_logits).logits(one, Draws(8))[4].float().square().mean().sqrt()

    def rounded(model: nn.Module, batch: Batch) -> Tensor:
        logits = end_logits(model, batch).float()
        if len(logits) < 8:
            return logits
        generator = torch.Generator().manual_seed(len(logits))
        off = {
            "one draw's": 0.05 * size * (torch.arange(8) == 4)[:, None],
            "by size": 0.06 * size * torch.randn(logits.shape, generator=generator),
            "another's": logits.roll(1, 0) - logits,
        }
        return logits + off[what]

    shapes = passes(model)
    for _ in range(2):
        shapes.clear()
        posterior.on(rounded).logits({**one, "attention_mask": torch.ones(1, 12)}, Draws(8))
    assert shapes == ([(1, 12)] * 8 if what == "another's" else [(8, 12)])


def test_what_is_undecided_is_asked_ever_more_rarely():
    verdicts = Verdicts()
    due = [number for number in range(1, 40) if verdicts.due("kind")]
    assert due == [1, 2, 4, 8, 16, 32]
    verdicts.put("kind", agrees=True)
    assert not verdicts.due("kind")


# What is shared is exact


def neo() -> nn.Module:
    kinds = [[["global", "local"], 1]]
    sizes = {"vocab_size": 400, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
    torch.manual_seed(0)
    config = GPTNeoConfig(**sizes, attention_types=kinds, window_size=8, initializer_range=0.2)
    return GPTNeoForCausalLM(config)


def prompts(count: int = 3, begin: int = 24, rest: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    common = torch.randint(4, 400, (begin,), generator=generator).expand(count, -1)
    own = torch.randint(4, 400, (count, rest), generator=generator)
    pad = torch.zeros(count, 2).long()
    mask = torch.cat([pad, torch.ones(count, begin + rest).long()], 1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    ids = torch.cat([pad, common, own], 1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": places}


def last(model: nn.Module, batch: Batch) -> Tensor:
    return last_logits(model, batch, 1)[:, -1, :5]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("count", [0, 4])
def test_windows_that_a_model_does_not_tell_of(known, count, monkeypatch):
    """Found by name; and by comparison where no name tells."""
    monkeypatch.setattr(common, "PASS", 0)
    if not known:
        monkeypatch.setattr("bayestune.forward.kept_tokens.has_own_window", lambda config: False)
    posterior = Gaussian(converted(neo(), target_modules=["q_proj", "v_proj"]), last)
    with torch.no_grad():
        mean = last(posterior.model, prompts())[None]
    expected = one_by_one(posterior, prompts(), Draws(count)) if count else mean
    for _ in range(3):
        assert_close(posterior.logits(prompts(), Draws(count)), expected, **CLOSE)


def test_a_prefix_that_is_exact_is_still_shared(monkeypatch):
    monkeypatch.setattr(common, "PASS", 0)
    posterior = Gaussian(converted(causal(CAUSAL["llama"])), last)
    seen = passes(posterior.model)
    expected = one_by_one(posterior, prompts(), Draws(4))
    for _ in range(3):
        seen.clear()
        assert_close(posterior.logits(prompts(), Draws(4)), expected, **CLOSE)
    assert seen == [(12, 8)]


def test_packing_is_tried_before_it_is_chosen(byte_level, monkeypatch):
    llama = causal(CAUSAL["llama"])
    assert can_pack(llama)
    assert not can_pack(neo())
    packed = TextScorer(byte_level, coloured_questions())
    batch = packed.collate(packed.encode(coloured_questions().train[:2]))
    with pytest.raises(ValueError, match='packed for a GPTNeo.*use layout="expanded"'):
        packed(neo(), batch)
    monkeypatch.setattr("bayestune.scoring.text.has_own_window", lambda config: False)
    narrow = neo()
    assert not can_pack(narrow), "the trial shows it"


# Models


def test_compiled_models_predict_as_plain_ones(posterior):
    plain = [posterior.logits(BATCH, Draws(count)) for count in (0, 3)]
    whole = torch.compile(posterior.model, backend="eager")
    for count, expected in zip((0, 3), plain, strict=True):
        found = Gaussian(whole, end_logits).logits(BATCH, Draws(count))
        assert_close(found, expected, **CLOSE)
    blocks = posterior.model.get_base_model().model.layers
    blocks[1] = torch.compile(blocks[1], backend="eager")
    assert Slots(posterior.model).names() == Slots(whole).names()
    for count, expected in zip((0, 3), plain, strict=True):
        assert_close(Gaussian(posterior.model, end_logits).logits(BATCH, Draws(count)), expected)


def test_a_compiled_base_inside_peft():
    plain = Gaussian(converted(tiny_llama()), end_logits)
    compiled = adapted(torch.compile(tiny_llama(), backend="eager"))
    bayesify(compiled, init_root_std=0.5)
    for one, other in zip(Slots(plain.model).modules(), Slots(compiled).modules(), strict=True):
        assert one == other
    with torch.no_grad():
        for name, slot in (
            Slots(plain.model).of_kind(type(next(iter(plain.layers().values())))).items()
        ):
            Slots(compiled).modules()[name].root_std.copy_(slot.root_std)
    found = Gaussian(compiled, end_logits).logits(BATCH, Draws(3))
    assert_close(found, plain.logits(BATCH, Draws(3)), **CLOSE)


def test_data_parallel_wrappers_are_looked_through(posterior):
    expected = posterior.logits(BATCH, Draws(3))
    wrapped = Gaussian(nn.DataParallel(posterior.model), end_logits)
    assert_close(wrapped.logits(BATCH, Draws(3)), expected, **CLOSE)
    assert wrapped.slots.names() == posterior.slots.names()


def test_trainable_tokens_beside_lora():
    posterior = Gaussian(converted(tiny_llama(), trainable_token_indices=[5]), end_logits)
    expected = one_by_one(posterior, BATCH, Draws(3))
    assert_close(posterior.logits(BATCH, Draws(3)), expected, **CLOSE)


def test_adapters_of_any_name_and_outputs_that_are_tuples():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=TARGETS), "my adapter")
    bayesify(randomised(model), init_root_std=0.5)
    posterior = Gaussian(model, lambda m, b: m(**b, return_dict=False)[0][:, -1, :4])
    expected = one_by_one(posterior, BATCH, Draws(3))
    assert_close(posterior.logits(BATCH, Draws(3)), expected, **CLOSE)


def test_batches_with_segments_and_values_that_are_no_tensors():
    posterior = Gaussian(
        converted(tiny_bert(), target_modules=["query"], task_type="SEQ_CLS"), class_logits
    )
    segments = (torch.arange(12) > 5).long().expand(2, -1)
    batch: Any = {**BATCH, "token_type_ids": segments, "output_attentions": False}
    expected = one_by_one(posterior, batch, Draws(3))
    assert_close(posterior.logits(batch, Draws(3)), expected, **CLOSE)


def test_autocast_shares_passes(posterior):
    seen = passes(posterior.model)
    logits = posterior.logits(BATCH, Draws(6, bf16=True))
    exact = posterior.logits(BATCH, Draws(6))
    assert seen[0] == (12, 12)
    assert (logits - exact).square().mean().sqrt() < 0.1 * exact.std(0).mean()
    seen.clear()
    posterior.logits(BATCH, Draws(6, bf16=True))
    assert seen == [(12, 12)]


# Laplace


@pytest.mark.parametrize("tokens", [4, 6, 7])
def test_jacobians_are_each_rows_own(tokens):
    """Where time leads, a batch has the moments of its rows one by one."""
    model = time_major()
    Slots(model).put({name: _plain(slot) for name, slot in Slots(model).modules().items()})
    batch = {"input_ids": torch.arange(3, 3 + 2 * tokens).reshape(2, tokens)}
    rows = [{"input_ids": batch["input_ids"][row : row + 1]} for row in range(2)]
    together = gauss_newton(Slots(model), class_logits, [batch], structure="diagonal")
    alone = gauss_newton(Slots(model), class_logits, rows, structure="diagonal")
    for name, block in alone.blocks.items():
        assert_close(together.blocks[name].values, block.values, rtol=1e-4, atol=1e-6)
    posterior = Linearised(model, class_logits, alone.blocks, 1.0)
    _, covariance = posterior.moments(batch)
    expected = torch.cat([posterior.moments(row)[1] for row in rows])
    assert_close(covariance, expected, rtol=1e-4, atol=1e-5)


def _plain(slot: Any) -> nn.Linear:
    layer = nn.Linear(slot.in_features, slot.out_features, bias=False)
    layer.weight = slot.weight
    return layer


def test_a_point_is_not_asked_for_draws(posterior):
    point = Point(posterior.model, end_logits)
    assert_close(point.logits(BATCH, Draws(3))[2], end_logits(posterior.model, BATCH), **CLOSE)


def test_heads_of_one_class_beside_lora_are_named():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=1))
    posterior = Gaussian(
        converted(model, target_modules=["query"], task_type="SEQ_CLS"), class_logits
    )
    with pytest.raises(ValueError, match="num_labels=2"):
        predict(posterior, BATCH)


@pytest.mark.parametrize("draws", [1, 3])
def test_draws_of_b_keep_its_bias(draws):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    batch = {name: value.repeat(draws, 1) for name, value in BATCH.items()}
    stacks = {n: w.expand(draws, *w.shape) for n, w in Slots(model).weights().items()}
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
        with drawn(model, stacks):
            assert_close(model(**batch).logits, expected)


def test_layers_that_are_no_plain_maps_hold_no_draws():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    stacks = {name: weight[None] for name, weight in Slots(model).weights().items()}
    with (
        pytest.raises(Refusal, match=r"4 of 4 slots cannot hold draws, expected plain LoRA"),
        drawn(model, stacks),
    ):
        pass
