"""Bases in 4 and 8 bits (bitsandbytes), in the commands and in the two lines."""

import copy
import importlib.util
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.testing import assert_close
from transformers import (
    BitsAndBytesConfig,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from bayestune import Gaussian, bayesify, export_draw, load_posterior, save_posterior
from bayestune.adapters import Lora, Slots, attach, detach, precision_of
from bayestune.evaluation import RECORDS
from bayestune.forward import Draws
from bayestune.methods import METHODS
from bayestune.models import load_model
from bayestune.posteriors import Point
from bayestune.scoring import make_scorer
from models.ggufs import small, write_gguf
from promises import SHORT, TRAINING, exportable
from running import failed, fitting, furnish, predicted, probabilities, run
from tiny import (
    GPT2,
    SIZES,
    byte_level_tokenizer,
    coloured_questions,
    labelled_sentences,
    randomised,
    tiny_bert,
    tiny_llama,
)

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.stacks

BITS = ("4bit", "8bit")
SIZE = {"hidden_size": 64, "intermediate_size": 128}
# of the logits: products in bfloat16, and in 8 bits outliers of a batch
ROUNDING = {"rtol": 0.02, "atol": 0.02}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("bits"), tiny_llama(**SIZE), byte_level_tokenizer())


@pytest.fixture(scope="module", params=BITS)
def bits(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(place, bits):
    return load_model(str(place / "model"), dtype=bits)


@pytest.fixture(scope="module")
def scorer(loaded):
    return make_scorer(loaded.model, loaded.tokenizer, coloured_questions(), "letter")


@pytest.fixture(scope="module")
def batch(scorer):
    made = scorer.collate(scorer.encode(scorer.task.evaluation))
    made.pop("labels")
    return made


def finite(logits):
    return logits.nan_to_num(neginf=0.0)


def saved(folder, model):
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return str(folder)


def alone(posterior, batch, draws):
    """Each draw in a pass of its own, as the adapter's own weights."""
    slots = Slots(posterior.model, posterior.adapter).modules()
    means = {name: slot.weight.detach().clone() for name, slot in slots.items()}
    found = []
    with torch.no_grad():
        for index in draws.indices:
            for name, weight in posterior.draw(index).items():
                slots[name].weight.copy_(weight)
            found.append(posterior.scorer(posterior.model.eval(), batch))
            for name, mean in means.items():
                slots[name].weight.copy_(mean)
    return torch.stack(found)


# Loading


def test_linear_layers_are_quantised_and_the_rest_is_float32(loaded, bits):
    kinds = {type(m).__name__ for m in loaded.model.model.layers[0].self_attn.children()}
    assert kinds == {{"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[bits]}
    assert type(loaded.model.lm_head) is nn.Linear
    floats = {p.dtype for p in loaded.model.parameters() if p.is_floating_point()}
    assert floats == {torch.float32}
    assert precision_of(loaded.model) == precision_of(copy.deepcopy(loaded.model)) == bits
    adapted = attach(loaded.again().model, Lora())
    assert precision_of(adapted) == bits
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}


def test_the_function_is_near_the_float_models(loaded, place, batch, scorer):
    whole = load_model(str(place / "model")).model
    with torch.no_grad():
        plain = finite(scorer(whole, batch))
        few = finite(scorer(loaded.model, batch))
    assert 0 < (few - plain).norm() / plain.norm() < 0.25


def test_passes_leave_the_weights_as_they_are(loaded, batch, scorer):
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    with torch.no_grad():
        first = scorer(loaded.model, batch)
    assert all(torch.equal(p, before[name]) for name, p in loaded.model.named_parameters())
    scorer(loaded.model.train(), batch)
    with torch.no_grad():
        assert torch.equal(scorer(loaded.model.eval(), batch), first)


def test_a_model_beside_it_shares_the_weights(loaded, batch, scorer):
    scorer(loaded.model, batch)
    twin = loaded.again().model
    for own, other in zip(loaded.model.modules(), twin.modules(), strict=True):
        if hasattr(own, "weight"):
            assert own.weight.data_ptr() == other.weight.data_ptr()
        if hasattr(own, "state"):
            assert own.state.CB.data_ptr() == other.state.CB.data_ptr()
    with torch.no_grad():
        assert torch.equal(scorer(twin, batch), scorer(loaded.model, batch))


def test_conv1d_and_odd_widths_are_quantised_too(bits, tmp_path, scorer, batch):
    torch.manual_seed(0)
    gpt2 = saved(tmp_path / "gpt2", GPT2LMHeadModel(GPT2))
    odd = saved(tmp_path / "odd", tiny_llama(hidden_size=40, intermediate_size=56))
    for name, target in ((gpt2, "c_attn"), (odd, "v_proj")):
        given = load_model(name, dtype=bits)
        model = randomised(attach(given.model, Lora(targets=(target,))))
        bayesify(model, init_root_std=0.5)
        posterior = Gaussian(model, scorer)
        logits = posterior.logits(batch, Draws(3))
        assert finite(logits).std(0).max() > 1e-2
        assert_close(logits, alone(posterior, batch, Draws(3)), **ROUNDING)


def test_experts_in_one_tensor_are_said_to_stay(bits, tmp_path, caplog):
    more = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    folder = saved(tmp_path, MixtralForCausalLM(MixtralConfig(**SIZES, **more)))
    caplog.set_level(logging.WARNING, "bayestune")
    load_model(folder, dtype=bits)
    assert f"{bits} reaches" in caplog.text
    assert "stay" in caplog.text or "in float32" in caplog.text


def test_what_is_quantised_already_is_refused_and_loads_as_it_is(bits, tmp_path):
    loaded = load_model(saved(tmp_path / "plain", tiny_llama(**SIZE)), dtype=bits)
    folder = saved(tmp_path / "few", loaded.model)
    assert precision_of(load_model(folder).model) == bits
    with pytest.raises(ValueError, match=r"is quantised already: got dtype '4bit' for weights of"):
        load_model(folder, dtype="4bit")


# Fits


@pytest.mark.parametrize("name", METHODS)
def test_each_method_fits_saves_and_loads(name, loaded, bits, scorer, batch, tmp_path):
    base = loaded.again(shared=False).model
    before = {name: p.clone() for name, p in base.named_parameters()}
    method = METHODS[name](**SHORT.get(name, {}))
    posterior = method.fit(base, scorer, TRAINING)
    logits = posterior.logits(batch, Draws(3))
    assert torch.isfinite(logits).any(-1).all()
    again = load_posterior(
        loaded.again().model, save_posterior(posterior, tmp_path / "fit"), scorer
    )
    assert_close(again.logits(batch, Draws(3)), logits, **ROUNDING)
    if exportable(posterior):
        plain = loaded.again().model
        plain = PeftModel.from_pretrained(plain, export_draw(posterior, 1, tmp_path / "draw"))
        exported = Point(plain, scorer).logits(batch, Draws(0))[0]
        assert_close(exported, logits[1], **ROUNDING)
    after = dict(detach(posterior.model).named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("gate_proj", "down_proj", "lm_head")])
def test_draws_of_a_pass_are_those_alone(loaded, scorer, batch, targets):
    model = randomised(attach(loaded.again().model, Lora(targets=targets)))
    bayesify(model, init_root_std=0.5)
    posterior = Gaussian(model, scorer)
    logits = posterior.logits(batch, Draws(4))
    expected = alone(posterior, batch, Draws(4))
    spread = finite(expected).std(0).max()
    assert spread > 0.05
    gap = (finite(logits) - finite(expected)).square().mean().sqrt()
    assert gap < 0.05 * spread


def gradients(model, batch, **checkpoints):
    model.train()
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpoints)
    torch.manual_seed(3)
    model(**batch).logits.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_the_same_under_checkpoints(loaded, batch, reentrant):
    found = []
    for options in ({}, {"use_reentrant": reentrant}):
        torch.manual_seed(2)
        model = randomised(attach(loaded.again().model, Lora()))
        bayesify(model, init_root_std=0.3)
        found.append(gradients(model, batch, **options))
    assert all(gradient is not None and gradient.any() for gradient in found[1].values())
    assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


def test_fused_inputs_give_what_layers_alone_give(loaded, batch):
    """q_proj and v_proj receive copies of one tensor, which PEFT casts to the adapter's type."""
    found = []
    for fused in (True, False):
        torch.manual_seed(2)
        base = loaded.again(shared=False).model
        for parameter in base.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.bfloat16()
        model = randomised(attach(base, Lora(targets=("q_proj", "v_proj"))))
        bayesify(model, init_root_std=1e-4)  # the noise is another one, so it is next to none
        layers = [slot for slot in Slots(model).modules().values() if hasattr(slot, "fused")]
        assert all(layer.fused is not None for layer in layers)
        for layer in layers if not fused else ():
            layer.fused, layer.ranks = None, slice(None)
        found.append(gradients(model, batch))
    for name, gradient in found[0].items():
        if "root_std" not in name:
            assert_close(gradient, found[1][name], rtol=5e-3, atol=1e-5)


# The two lines


def test_peft_s_own_recipe_for_qlora_trains_a_gaussian_adapter(place, bits, batch):
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    asked = BitsAndBytesConfig(**(four if bits == "4bit" else {"load_in_8bit": True}))
    base = LlamaForCausalLM.from_pretrained(place / "model", quantization_config=asked)
    base = prepare_model_for_kbit_training(base)
    model = randomised(get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"])))
    bayesify(model)
    found = gradients(model, batch)
    assert len(found) == 3 * 4
    assert all(gradient is not None and gradient.any() for gradient in found.values())


# The commands


def test_a_fit_is_opened_in_its_bits_by_every_command(place, bits):
    run(*fitting(place, output=bits, dtype=bits, steps=6, learning_rate=0.01))
    folder = place / bits
    assert json.loads((folder / "posterior.json").read_text())["dtype"] == bits
    probabilities_here = probabilities(predicted(place, posterior=bits))
    posterior = load_posterior(load_model(str(place / "model"), dtype=bits).model, folder)
    assert precision_of(posterior.model) == bits
    run("evaluate", f"--posterior={folder}", f"--evaluation_data={place / 'test.jsonl'}")
    record = json.loads((folder / RECORDS).read_text().splitlines()[0])
    assert record["config"]["dtype"] == bits
    assert probabilities_here == probabilities(predicted(place, posterior=bits))


@pytest.mark.parametrize("make", [tiny_bert, "modernbert"])
def test_an_encoder_s_head_is_not_quantised(make, bits, tmp_path):
    if make == "modernbert":
        config = ModernBertConfig(**SIZES, num_labels=3, cls_token_id=1, sep_token_id=2)
        model = ModernBertForSequenceClassification(config)
    else:
        model = make()
    name = saved(tmp_path, model)
    loaded = load_model(name, dtype=bits, num_labels=3)
    task = labelled_sentences()
    scorer = make_scorer(loaded.model, loaded.tokenizer, task, "head")
    targets = ("Wqkv",) if make == "modernbert" else ("query", "value")
    training = replace(TRAINING, lora=Lora(targets=targets))
    posterior = METHODS["blob"]().fit(loaded.model, scorer, training)
    batch = scorer.collate(scorer.encode(task.evaluation))
    batch.pop("labels")
    assert torch.isfinite(posterior.logits(batch, Draws(2))).all()
    assert type(detach(posterior.model).classifier) is nn.Linear


def test_a_comparison_fits_one_method_after_the_other_on_the_same_base(place, bits):
    options = {"evaluation_data": place / "test.jsonl", "methods": "[mle,blob,laplace,tfb]"}
    options |= {
        "tfb.anchors": 4,
        "tfb.draws": 2,
        "tfb.evaluations": 2,
        "gradient_checkpointing": "true",
    }
    run(*fitting(place, "compare", f"compare-{bits}", dtype=bits, **options))
    run(*fitting(place, "compare", f"alone-{bits}", dtype=bits, **options | {"methods": "[blob]"}))
    found = []
    for folder in (f"compare-{bits}", f"alone-{bits}"):
        lines = (place / folder / RECORDS).read_text().splitlines()
        found.append([r["metrics"]["nll"] for r in map(json.loads, lines) if r["method"] == "blob"])
    assert_close(*found)


def test_a_gguf_s_weights_are_unpacked_and_quantised_again(bits, tmp_path):
    file = write_gguf(small(initializer_range=0.1), tmp_path / "tiny.gguf")
    loaded, whole = (
        load_model(str(file), dtype=kind, cache_dir=tmp_path / "cache").model
        for kind in (bits, torch.float32)
    )
    assert precision_of(loaded) == bits
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        few, many = loaded(ids).logits, whole(ids).logits
    assert 0 < (few - many).norm() / many.norm() < 0.5


def test_another_precision_than_the_fit_s_is_said(place, bits, caplog, scorer):
    run(*fitting(place, output=f"said-{bits}", dtype=bits))
    caplog.set_level(logging.WARNING, "bayestune")
    load_posterior(load_model(str(place / "model")).model, place / f"said-{bits}", scorer)
    assert f"fitted over a base in {bits}" in caplog.text


def test_bits_of_a_plain_adapter_alone_can_be_given(place, bits, capsys):
    run(*fitting(place, output=f"given-{bits}", dtype=bits))
    arguments = ["calibrate", place / f"given-{bits}", f"--rows={place / 'test.jsonl'}"]
    said = failed([*arguments, f"--dtype={bits}"], capsys)
    assert "got --dtype for a posterior; expected a plain adapter" in said


@pytest.mark.parametrize("given", [[], ["--bits", "8"]])
def test_the_example_runs(given, place, capsys):
    file = Path(__file__).parents[2] / "examples" / "qlora.py"
    spec = importlib.util.spec_from_file_location("example_qlora", file)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(["--model", str(place / "model"), "--steps", "20", "--draws", "3", *given])
    said = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", said)]
    assert losses[-1] < 0.9 * losses[0]
    assert said.count("nats of disagreement") == 3
