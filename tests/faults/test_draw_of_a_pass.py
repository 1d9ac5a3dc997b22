"""In training a draw belongs to a pass of the model and to a row, however its layers are called."""

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bayestune
from bayestune import bayesify, drawn, group_rows
from bayestune.adapters import (
    SIDES,
    GaussianLinear,
    RankLinear,
    Slots,
    TrainingPasses,
    attach,
    detach,
    make_ranks_random,
)
from bayestune.adapters.lora import Lora
from bayestune.methods.dalorra import GatedLinear
from bayestune.methods.scalabl import SingularLinear
from tiny import tiny_llama

VOCABULARY = 60
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {
    **DECODER,
    "max_position_embeddings": 70,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
ALBERT = {**ENCODER, "embedding_size": 16, "hidden_dropout_prob": 0.0, "classifier_dropout_prob": 0}
SWIN = {"image_size": 16, "patch_size": 2, "window_size": 2, "depths": [1, 1], "num_heads": [2, 2]}
SWIN |= {"embed_dim": 16, "num_labels": 3, "drop_path_rate": 0.0}
XLNET = {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
FAMILIES: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER, ["q_proj", "v_proj", "down_proj"]),
    "bert": ("BertForSequenceClassification", "BertConfig", ENCODER, ["query", "key", "dense"]),
    "albert": (
        "AlbertForSequenceClassification",
        "AlbertConfig",
        ALBERT,
        ["query", "value", "ffn"],
    ),
    "opt": (  # its fc1 and fc2 see (rows × tokens, …)
        "OPTForCausalLM",
        "OPTConfig",
        {**DECODER, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
        ["q_proj", "fc1", "fc2"],
    ),
    "longformer": (
        "LongformerForSequenceClassification",
        "LongformerConfig",
        {**ENCODER, "attention_window": 4},
        ["query", "key", "value", "dense"],
    ),
    "xlnet": (
        "XLNetForSequenceClassification",
        "XLNetConfig",
        {**XLNET, "num_labels": 3, "dropout": 0.0},
        ["layer_1", "layer_2"],
    ),
    "fsmt": (
        "FSMTForConditionalGeneration",
        "FSMTConfig",
        {
            **SEQ2SEQ,
            "langs": ["en", "de"],
            "src_vocab_size": VOCABULARY,
            "tgt_vocab_size": VOCABULARY,
        },
        ["q_proj", "k_proj", "v_proj", "fc1"],
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        SEQ2SEQ,
        ["q_proj", "k_proj", "v_proj", "fc1"],
    ),
    "deberta": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**ENCODER, **RELATIVE, "share_att_key": True},
        ["query_proj", "key_proj", "value_proj"],
    ),
    "swin": (  # its attention sees (rows × windows, …)
        "SwinForImageClassification",
        "SwinConfig",
        SWIN,
        ["q_proj", "v_proj", "fc1"],
    ),
    "bert_choice": ("BertForMultipleChoice", "BertConfig", ENCODER, ["query", "value"]),
    "xlnet_choice": (
        "XLNetForMultipleChoice",
        "XLNetConfig",
        {**XLNET, "dropout": 0.0},
        ["layer_1", "layer_2"],
    ),
}
Noises = Mapping[Any, Any]


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def adapted(family: str, *, double: bool = False, **changes: object) -> Any:
    """A PEFT model of a family, without dropout, whose B is not zero."""
    kind, config, fields, targets = FAMILIES[family]
    torch.manual_seed(0)
    base = getattr(transformers, kind)(getattr(transformers, config)(**{**fields, **changes}))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets))
    with torch.no_grad():
        for layer in Slots(model).layers.values():
            layer.lora_B["default"].weight.normal_(std=0.3)
    return without_dropout(model.double() if double else model)


def gaussian(family: str, noise: str = "row", **settings: Any) -> Any:
    model = adapted(family, **settings)
    bayesify(model, init_root_std=0.6, noise=noise)  # type: ignore[arg-type]
    return model.train()


def batch(*shape: int, seed: int = 0, **more: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, shape, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def inputs(family: str, rows: int, tokens: int) -> dict[str, Tensor]:
    if family == "swin":
        return {"pixel_values": torch.randn(rows, 3, 16, 16)}
    shape = (rows, 2, tokens) if family.endswith("choice") else (rows, tokens)
    more = {}
    if family in ("fsmt", "bart"):
        more["decoder_input_ids"] = batch(rows, 5, seed=1)["input_ids"]
    if family == "longformer":
        more["global_attention_mask"] = torch.eye(1, tokens).long().expand(rows, -1)
    return batch(*shape, **more)


@pytest.fixture
def kept(monkeypatch) -> list[Noises]:
    """The noise of the layers in each pass, when it ends."""
    noises: list[Noises] = []
    end = TrainingPasses.end

    def keep(self: TrainingPasses, depth: int, output: object) -> None:
        for open_depth, one in list(self._open.values()):
            if open_depth == depth:
                noises.append(dict(one.noises))
        end(self, depth, output)

    monkeypatch.setattr(TrainingPasses, "end", keep)
    return noises


def draws_of_row(model: nn.Module, noises: Noises, row: int) -> dict[str, Tensor]:
    """The A (1, r, k) that a row of a pass saw, by slot name."""
    found = {}
    for name, layer in Slots(model).of_kind(GaussianLinear).items():
        noise, sign_out, sign_in = noises[layer.fused or layer].of_ranks(layer.ranks)
        own = 0 if layer.row_axis is None else row
        sign = sign_out[own][:, None] * sign_in[own]
        found[name] = (layer.weight + layer.std * noise * sign)[None].detach()
    return found


# A row of a pass is what the row gives alone, under one plain adapter


@pytest.mark.parametrize(("rows", "tokens"), [(3, 8), (8, 8)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_in_training_is_the_row_alone_under_one_draw(family, rows, tokens, kept):
    model = gaussian(family)
    given = inputs(family, rows, tokens)
    output = model(**given).logits
    (noises,) = kept
    apart = []
    model.eval()
    for row in range(rows):
        own = {name: value[row : row + 1] for name, value in given.items()}
        with torch.no_grad(), drawn(model, draws_of_row(model, noises, row)):
            alone = model(**own).logits[0]
        assert_close(output[row], alone, rtol=1e-4, atol=1e-6)
        apart.append(alone)
    assert torch.stack(apart).std(0).max() > 1e-3


def test_noise_in_both_slots_is_a_rows_too(kept):
    model = adapted("albert")
    bayesify(model, init_root_std=0.6, slots=Slots(model).names(SIDES))
    given = inputs("albert", 3, 8)
    output = model.train()(**given).logits
    (noises,) = kept
    model.eval()
    for row in range(3):
        own = {name: value[row : row + 1] for name, value in given.items()}
        with torch.no_grad(), drawn(model, draws_of_row(model, noises, row)):
            assert_close(output[row], model(**own).logits[0], rtol=1e-4, atol=1e-6)


class Routed(nn.Module):
    """Experts that are sent tokens of any rows, and a layer on positions that all rows share."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6, bias=False) for _ in range(2)])
        self.positions = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor, sent: Tensor) -> Tensor:
        output = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            output[sent == number] = expert(x[sent == number])
        return output + self.positions(x[:1])


@pytest.mark.parametrize("sent", [4, 3, 0])
def test_an_input_that_is_no_rows_sees_one_draw(sent):
    torch.manual_seed(0)
    targets = ["experts.0", "experts.1", "positions"]
    model = get_peft_model(Routed(), LoraConfig(r=2, target_modules=targets))
    for layer in Slots(model).layers.values():
        nn.init.normal_(layer.lora_B["default"].weight)
    bayesify(model, init_root_std=0.7)
    numbers = torch.ones(4, 3).long()
    numbers.view(-1)[torch.randperm(12)[:sent]] = 0  # as many tokens as rows, fewer, none
    output = model.train()(torch.ones(4, 3, 6), numbers)
    for number in (0, 1):
        own = output[numbers == number]
        assert_close(own, own[:1].expand_as(own))


class Twice(nn.Module):
    """A layer that is called twice: directly, and tied under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def twice(noise: str = "row") -> Any:
    torch.manual_seed(1)
    model = get_peft_model(Twice(), LoraConfig(r=3, target_modules=["layer"]))
    nn.init.normal_(Slots(model).layers["layer"].lora_B["default"].weight)
    bayesify(model, init_root_std=0.7, noise=noise)  # type: ignore[arg-type]
    return model.double().train()


@pytest.mark.parametrize("noise", ["row", "independent"])
def test_gradients_through_two_calls_are_autograds_under_the_passes_noise(noise, kept):
    model = twice(noise)
    (layer,) = Slots(model).of_kind(GaussianLinear).values()
    lora = Slots(model).layers["layer"]
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    output = model(x)
    leaves = [layer.weight, layer.root_std, lora.lora_B["default"].weight]
    actual = torch.autograd.grad(output.square().sum(), leaves)
    (noises,) = kept
    noise_of_rows = noises[layer]
    if noise == "row":
        sign = noise_of_rows.sign_out[:, :, None] * noise_of_rows.sign_in[:, None]
        noise_of_rows = noise_of_rows.noise * sign
    drawn_rows = layer.weight + layer.root_std.square() * noise_of_rows

    def apply(x: Tensor) -> Tensor:
        low = torch.einsum("ntk,nrk->ntr", x, drawn_rows)
        return (
            F.linear(x, lora.weight, lora.bias) + F.linear(low, leaves[2]) * lora.scaling["default"]
        )

    expected = apply(torch.tanh(apply(x)))
    assert_close(output, expected)
    assert_close(actual, torch.autograd.grad(expected.square().sum(), leaves))


@pytest.mark.parametrize("noise", ["row", "independent"])
def test_the_covariance_of_two_calls_is_the_variance_and_passes_are_independent(noise):
    model = twice(noise)
    (layer,) = Slots(model).of_kind(GaussianLinear).values()
    count = 1500
    x = torch.randn(2, 1, 6, dtype=torch.float64)
    model.get_base_model().forward = lambda x: torch.stack([layer(x), layer(x)])
    with torch.no_grad():
        noises = torch.stack([model(x) for _ in range(count)]) - F.linear(x, layer.weight)
        variance = F.linear(x.square(), layer.std.square())
    first, second = noises[:, 0], noises[:, 1]
    assert torch.equal(first, second)
    assert ((first * second).mean(0) / variance - 1).abs().max() < 4.5 * (3 / count) ** 0.5
    scale = variance / count**0.5
    assert ((first[1:] * first[:-1]).mean(0) / scale).abs().max() < 4.5
    assert ((first[:, 0] * first[:, 1]).mean(0) / scale.prod(0).sqrt()).abs().max() < 8


def recorded(function: Callable[[Tensor], Tensor], given: list[Tensor]) -> Callable[..., Tensor]:
    return lambda value: given.append(value) or function(value)


@pytest.mark.parametrize("kind", [SingularLinear, GatedLinear])
def test_factors_of_ranks_are_held_for_the_pass_too(kind, monkeypatch):
    model = adapted("albert")
    more = {"init_std": 0.5} if kind is SingularLinear else {"init_kept": 0.5, "temperature": 0.5}
    layers = make_ranks_random(model, lambda plain, passes: kind(plain, passes, **more))
    model.train()
    seen: dict[RankLinear, list[Tensor]] = {layer: [] for layer in layers.values()}
    for layer, calls in seen.items():
        monkeypatch.setattr(layer, "factors", recorded(layer.factors, calls))
    model(**batch(3, 8))
    assert all(len(calls) == 2 and torch.equal(*calls) for calls in seen.values())
    model(**batch(3, 8))
    assert all(not torch.equal(calls[0], calls[2]) for calls in seen.values())


# Checkpoints: they recompute calls when their pass has ended

FORMS = {"reentrant": {"use_reentrant": True}, "not reentrant": {"use_reentrant": False}}
Loss = Callable[[Any], Tensor]


class Looped(nn.Module):
    """A block that is applied three times, as in ALBERT, each time under a checkpoint if asked."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.v_proj = nn.Linear(6, 6)
        self.checkpoints: dict[str, Any] | None = None

    def block(self, x: Tensor) -> Tensor:
        return F.dropout(self.q_proj(x).tanh() + self.v_proj(x), 0.3, self.training)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = checkpoint(self.block, x, **self.checkpoints) if self.checkpoints else self.block(x)
        return x


def looped(targets: tuple[str, ...] = ("q_proj", "v_proj"), noise: str = "row") -> Any:
    torch.manual_seed(1)
    model = get_peft_model(Looped(), LoraConfig(r=3, target_modules=list(targets)))
    for layer in Slots(model).layers.values():
        nn.init.normal_(layer.lora_B["default"].weight)
    bayesify(model, init_root_std=0.7, noise=noise)  # type: ignore[arg-type]
    return model.double().train()


def features(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, 6, dtype=torch.float64, generator=generator).requires_grad_()


def one_pass(run: Callable[..., Tensor], model: Any) -> Tensor:
    return run(4).square().sum()


def several_passes(run: Callable[..., Tensor], model: Any) -> Tensor:
    """Of unlike rows, as the columns of a sentence encoder are, and references in between."""
    first = run(4).square().sum()
    group_rows(model, row_of=[0, 1, 0, 1, 2, 2])
    second = run(6, seed=1).square().sum()
    third = run(4).sum()
    with torch.no_grad(), model.disable_adapter():
        run(4)
    with torch.no_grad():
        run(2)
    return first + second * third


LOSSES = [one_pass, several_passes]


def gradients(model: Any, run: Callable[..., Tensor], loss: Callable[..., Tensor]) -> list[Tensor]:
    """Accumulated over two steps."""
    torch.manual_seed(5)
    for _ in range(2):
        loss(run, model).backward()
    return [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("targets", "noise"),
    [(("q_proj", "v_proj"), "row"), (("q_proj",), "row"), (("q_proj", "v_proj"), "independent")],
)
def test_a_layer_that_a_checkpoint_calls_again_keeps_its_draw(targets, noise, form, loss):
    model = looped(targets, noise)
    twin = copy.deepcopy(model)
    twin.base_model.model.checkpoints = FORMS[form]
    found = [
        gradients(one, lambda rows, seed=0, one=one: one(features(rows, seed)), loss)
        for one in (model, twin)
    ]
    assert_close(*found, rtol=1e-12, atol=1e-12)  # reentrant checkpoints sum in another order
    assert len(found[0]) == 3 * len(targets)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "deberta", "bart"])
def test_a_models_checkpoints_find_the_draws_of_their_pass(family, form, loss):
    model = gaussian(family, double=True)
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs=FORMS[form])
    twin.enable_input_require_grads()

    def run_of(one: Any) -> Callable[..., Tensor]:
        def run(rows: int, seed: int = 0) -> Tensor:
            given = batch(rows, 8, seed=seed)
            if family == "bart":
                given["decoder_input_ids"] = given["input_ids"][:, :5]
            return one(**given).logits

        return run

    found = [gradients(one, run_of(one), loss) for one in (model, twin)]
    assert_close(*found, rtol=1e-12, atol=1e-12)
    assert len(found[0]) >= 3


def test_a_checkpoint_that_does_not_restore_the_generator_is_refused():
    model = looped()
    model.base_model.model.checkpoints = {"use_reentrant": False, "preserve_rng_state": False}
    loss = model(features(4)).sum()
    torch.rand(1)
    with pytest.raises(
        ValueError, match=r"does not find the draw of its pass: .*preserve_rng_stat"
    ):
        loss.backward()


def test_a_pass_that_is_run_again_from_the_same_state_has_the_same_draws():
    """As in losses that cache gradients: once without gradients, then again with them."""
    model = looped()
    torch.manual_seed(3)
    with torch.no_grad():
        first = [model(features(4)), model(features(2))]
    torch.manual_seed(3)
    again = [model(features(4)), model(features(2))]
    assert all(map(torch.equal, first, again))


def test_a_pass_is_kept_as_long_as_its_graph():
    model = looped()
    passes = next(iter(Slots(model).of_kind(GaussianLinear).values())).passes
    outputs = [model(features(4)) for _ in range(5)]
    assert len(set(passes._named.values())) == 5
    del outputs
    assert len(set(passes._named.values())) == 1  # the last


# Which sequences are a row


def sequences_alike(model: Any, count: int, **given: Any) -> list[int]:
    """For each of so many equal sequences, the first one with the same draw."""
    ids = batch(1, 8)["input_ids"].expand(count, -1)
    output = model(input_ids=ids, **given).logits[:, -1]
    return [next(i for i in range(count) if torch.equal(output[i], one)) for one in output]


def test_rows_are_asked_for_by_size_by_number_or_by_a_function_for_a_pass_or_for_all():
    model = gaussian("llama")
    assert bayestune.group_rows is group_rows
    assert sequences_alike(model, 4) == [0, 1, 2, 3]
    group_rows(model, 2)
    assert sequences_alike(model, 4) == [0, 0, 2, 2]
    group_rows(model, row_of=[0, 1, 0, 1])
    assert sequences_alike(model, 4) == [0, 1, 0, 1]
    assert sequences_alike(model, 4) == [0, 1, 2, 3]
    group_rows(model, row_of=lambda n: [i % (n // 2) for i in range(n)], lasting=True)
    assert sequences_alike(model, 4) == [0, 1, 0, 1]
    assert sequences_alike(model, 6) == [0, 1, 2, 0, 1, 2]
    group_rows(model, 1)
    assert sequences_alike(model, 4) == [0, 1, 2, 3]
    assert sequences_alike(model, 4) == [0, 1, 0, 1]
    group_rows(model, 1, lasting=True)
    assert sequences_alike(model, 4) == [0, 1, 2, 3]


def test_a_reference_pass_does_not_use_the_rows_up():
    model = gaussian("llama")
    group_rows(model, row_of=torch.tensor([1, 0, 1, 0]))
    with torch.no_grad(), model.disable_adapter():
        sequences_alike(model, 4)
    assert sequences_alike(model, 4) == [0, 1, 0, 1]


@pytest.mark.parametrize("family", ["llama", "opt", "longformer"])
@pytest.mark.parametrize("noise", ["row", "independent"])
def test_any_layer_sees_the_rows_that_were_asked_for(family, noise):
    model = gaussian(family, noise)
    group_rows(model, row_of=[0, 1, 1, 0])
    output = model(input_ids=batch(1, 8)["input_ids"].expand(4, -1)).logits.flatten(1)
    assert_close(output[0], output[3])
    assert_close(output[1], output[2])
    assert not torch.allclose(output[0], output[1])


def test_options_of_a_question_see_one_draw_and_other_questions_others():
    model = gaussian("bert_choice")
    ids = batch(1, 1, 8)["input_ids"].expand(3, 4, -1)
    output = model(input_ids=ids).logits
    assert_close(output, output[:, :1].expand(-1, 4))
    assert len({f"{value:.6f}" for value in output[:, 0].tolist()}) == 3
    group_rows(model, 1)
    output = model(input_ids=ids).logits
    assert len({f"{value:.6f}" for value in output.flatten().tolist()}) == 12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "by a size or by row_of: got size=None and row_of=None"),
        ({"size": 2, "row_of": [0]}, "by a size or by row_of: got size=2"),
        ({"size": 0}, "are counted from 1: got 0, expected a positive integer"),
        ({"size": 1.5}, "are counted from 1: got 1.5"),
    ],
)
def test_rows_that_cannot_be_are_refused_at_once(given, message):
    with pytest.raises(bayestune.Refusal, match=message):
        group_rows(gaussian("llama"), **given)


@pytest.mark.parametrize("row_of", [[0, 1, 0], [0, 1, 0, -1], [0.0, 1.0, 0.0, 1.0]])
def test_rows_that_do_not_fit_the_batch_are_refused_in_the_pass(row_of):
    model = gaussian("llama")
    group_rows(model, row_of=row_of)
    with pytest.raises(bayestune.Refusal, match=r"does not fit the batch: .* each of the 4 sequen"):
        sequences_alike(model, 4)
    assert sequences_alike(model, 4) == [0, 1, 2, 3]


# Where a pass begins and ends


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("family", ["llama", "bart"])
def test_generation_in_training_mode_is_the_means(family, cache):
    model = gaussian(family)
    given = batch(3, 6)
    settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": cache}
    for one in (model, model.get_base_model()):
        tokens = one.generate(**given, **settings)
        assert model.training
        assert torch.equal(tokens, one.eval().generate(**given, **settings))
        model.train()
    more = {"decoder_input_ids": given["input_ids"]} if family == "bart" else {}
    assert not torch.equal(*[model(**given, **more).logits for _ in range(2)])


def test_a_training_pass_without_gradients_draws_and_an_inner_model_begins_one_too(kept):
    model = gaussian("albert")
    with torch.no_grad():
        outputs = [model(**batch(3, 8)).logits for _ in range(2)]
    assert not torch.equal(*outputs)
    model.get_base_model().albert(**batch(3, 8))
    assert len(kept) == 3
    assert len({id(one) for noises in kept for one in noises.values()}) == sum(map(len, kept))


def test_an_error_or_an_interrupt_in_a_pass_does_not_hold_its_draws():
    model = looped()
    x = features(2)
    for error in (RuntimeError, KeyboardInterrupt):

        def fail(*_: object, error: type[BaseException] = error) -> None:
            raise error

        hook = model.get_base_model().v_proj.register_forward_pre_hook(fail)
        with pytest.raises(error):
            model(x)
        hook.remove()
        assert not torch.equal(model(x), model(x))


def test_adapters_that_come_and_go_leave_one_hook():
    base = tiny_llama()
    for _ in range(3):
        model: Any = attach(base, Lora(targets=("q_proj",)))
        bayesify(model)
        model.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"]))
        bayesify(model, adapter="b")
        group_rows(model, 2, lasting=True)
        owners = [getattr(hook, "__self__", hook) for hook in model._forward_pre_hooks.values()]
        assert sorted(type(owner).__name__ for owner in owners) == ["Entrance", *["Unattended"] * 2]
        assert detach(model) is base
    assert len(base._forward_pre_hooks) == len(base._forward_hooks) == 1
    model = attach(base, Lora(targets=("q_proj",)))
    with torch.no_grad():
        for layer in Slots(model).layers.values():
            layer.lora_B["default"].weight.normal_()
    bayesify(model, init_root_std=0.5)
    assert sequences_alike(model.train(), 4) == [0, 1, 2, 3]  # the earlier one's rows are gone


def by_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("twin_of", [copy.deepcopy, by_pickle, by_torch])
@pytest.mark.parametrize("family", ["albert", "bart"])
def test_a_used_model_can_be_copied_and_the_copy_trains_by_itself(family, twin_of):
    model = gaussian(family)
    given = inputs(family, 4, 8)
    group_rows(model, 2, lasting=True)
    loss = model(**given).logits.sum()  # kept: its graph holds the pass
    twin = twin_of(model)
    for one in (model, twin):
        torch.manual_seed(2)
        one(**given).logits.square().mean().backward()
    loss.backward()
    model.zero_grad()
    torch.manual_seed(2)
    model(**given).logits.square().mean().backward()
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    assert_close([p.grad for p in twin.parameters() if p.requires_grad], expected)
    passes = [next(iter(Slots(m).of_kind(GaussianLinear).values())).passes for m in (model, twin)]
    assert passes[0] is not passes[1]
    assert twin.get_base_model()._forward_pre_hooks


def test_a_compiled_model_holds_its_draw_too():
    model = looped()
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    for seed in (1, 2):
        found = []
        for one in (model, compiled):
            torch.manual_seed(seed)
            found.append(one(features(3)))
        assert_close(*found)


def test_a_part_that_is_compiled_by_itself_is_at_the_mean_when_its_pass_is():
    model = looped()
    model.get_base_model().training = False  # no dropout, which differs by row
    layers = list(Slots(model).of_kind(GaussianLinear).values())
    for layer in layers:
        layer.compile(backend="eager")
    ids = features(1).expand(3, *features(1).shape[1:])
    passes = layers[0].passes
    passes.begin_run(None, lambda: True)
    with torch.no_grad():
        first, second, _ = model(ids)
    assert torch.equal(first, second)
    first, second, _ = model(ids)
    assert not torch.equal(first, second)
    passes.end_run()
    with torch.no_grad():
        first, second, _ = model(ids)
    assert not torch.equal(first, second)
