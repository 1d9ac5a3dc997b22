"""Families × bases: each method fits, is saved, exported and predicts on bases of several kinds.

Every method meets three bases, the third one in a slow test, and every base at least three methods;
beside it, what PEFT and torch offer around an adapter (patterns, checkpoints, half precision,
compilation) on several bases each.
"""

import copy
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from bases import BASES, Rows
from bayestune import bayesify
from bayestune.errors import Refusal
from bayestune.forward import Draws
from bayestune.methods import METHODS, MLE
from bayestune.posteriors import (
    Gaussian,
    Mixture,
    Posterior,
    export_draw,
    load_adapter,
    load_posterior,
    predict,
    save_posterior,
)
from bayestune.training import Training
from promises import exportable
from tiny import one_by_one, randomised

NAMES = list(BASES)
PAIRS: list[tuple[str, str]] = []
for number, name in enumerate(METHODS):
    PAIRS += [(name, NAMES[(3 * number + 5 * j) % len(NAMES)]) for j in range(3)]
SLOW = {2: pytest.mark.slow}  # the third base of a method
TRIED = [pytest.param(*pair, marks=SLOW.get(k % 3, ())) for k, pair in enumerate(PAIRS)]
SETTINGS: dict[str, dict[str, Any]] = {
    "tfb": {"anchors": 6, "draws": 2, "evaluations": 3},
    "posterior_scale": {"factors": (0.5, 1.0)},
    "ivon": {"learning_rate": 12.0},
    "swag": {"rate": 1.0, "every": 1},
    "ensemble": {"size": 2},
    "distilled": {"base": MLE(), "steps": 20, "learning_rate": 1e-2},
}
CLOSER = {"rtol": 1e-4, "atol": 1e-4}
TRAINING = {"steps": 20, "learning_rate": 2e-2, "batch_size": 6, "progress": False}
WITHOUT_SPREAD = {"mle", "map", "temperature", "early_stopping", "distilled"}


@cache
def fitted(method: str, base: str) -> tuple[Posterior, Rows, float]:
    """A fit, its scorer, and the loss of the model before it."""
    model = BASES[base].make()
    scorer = BASES[base].scorer()
    batch, labels = scorer.batch()
    with torch.no_grad():
        before = F.cross_entropy(scorer(model, batch), labels).item()
    training = Training(lora=BASES[base].lora, **TRAINING)
    return METHODS[method](**SETTINGS.get(method, {})).fit(model, scorer, training), scorer, before


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()


@pytest.mark.parametrize(("method", "base"), TRIED)
def test_a_fit_lowers_the_loss_and_its_draws_differ_unless_it_is_a_point(method, base):
    posterior, scorer, before = fitted(method, base)
    batch, labels = scorer.batch()
    found = predict(posterior, batch, 4)
    after = -found.probabilities[range(len(labels)), labels].log().mean().item()
    assert after < 0.9 * before
    spread = found.mutual_information.max()
    assert spread < 1e-9 if method in WITHOUT_SPREAD else spread > 1e-6


@pytest.mark.parametrize(("method", "base"), TRIED)
def test_a_saved_fit_predicts_the_same_to_the_bit(method, base, tmp_path):
    posterior, scorer, _ = fitted(method, base)
    batch, _ = scorer.batch("evaluation")
    loaded = load_posterior(BASES[base].make(), save_posterior(posterior, tmp_path), scorer)
    assert type(loaded) is type(posterior)
    assert torch.equal(loaded.logits(batch, Draws(3)), posterior.logits(batch, Draws(3)))


@pytest.mark.parametrize(("method", "base"), TRIED)
def test_draws_of_one_pass_are_the_draws_alone(method, base):
    posterior, scorer, _ = fitted(method, base)
    batch, _ = scorer.batch("evaluation")
    logits = posterior.logits(batch, Draws(3))
    if exportable(posterior):
        assert_close(logits, one_by_one(posterior, batch, Draws(3)), **CLOSER)
    else:  # draws of logits or of passes, all rows and draws together: the same when asked again
        assert torch.equal(posterior.logits(batch, Draws(3)), logits)


@pytest.mark.parametrize(("method", "base"), TRIED)
def test_a_draw_is_a_plain_adapter_in_stock_peft_or_is_refused(method, base, tmp_path):
    posterior, scorer, _ = fitted(method, base)
    batch, _ = scorer.batch("evaluation")
    if not exportable(posterior):
        with pytest.raises(ValueError, match="draws are not adapters: got draw 1, expected"):
            export_draw(posterior, 1, tmp_path)
        return
    plain = PeftModel.from_pretrained(BASES[base].make(), export_draw(posterior, 1, tmp_path))
    with torch.no_grad():
        stock = scorer(plain.eval(), batch)
    assert_close(stock, posterior.logits(batch, Draws(2))[1], **CLOSER)


@pytest.mark.parametrize(("method", "base"), TRIED)
def test_the_mean_is_the_stock_adapter_of_the_folder(method, base, tmp_path):
    posterior, scorer, _ = fitted(method, base)
    batch, _ = scorer.batch("evaluation")
    if isinstance(posterior, Mixture) or not posterior.has_mean:
        with pytest.raises(ValueError, match="mean"):
            posterior.logits(batch, Draws(0))
        return
    folder = save_posterior(posterior, tmp_path)
    plain = load_adapter(BASES[base].make(), folder, scorer)
    with torch.no_grad():
        stock = scorer(plain.model.eval(), batch)
    mean = posterior.logits(batch, Draws(0))[0]
    if method == "temperature":
        mean = mean * posterior.temperature
    assert_close(stock, mean, **CLOSER)


# What PEFT and torch offer around an adapter, under the two lines

FEATURES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "rank_pattern": ({}, ("llama", "bert", "t5", "vit")),
    "rslora": ({"use_rslora": True}, ("tied", "modernbert", "bart", "wav2vec2")),
    "all_linear": ({"target_modules": "all-linear"}, ("llama", "conv1d", "llava", "decoder_head")),
    "dropout": ({"lora_dropout": 0.3}, ("fused_qkv", "bert", "t5", "llava")),
    "trained_bias": ({"bias": "lora_only"}, ("conv1d", "bert", "bart")),
    "checkpointing": ({}, ("llama", "conv1d", "modernbert", "t5", "vit", "llava")),
    "bfloat16": ({}, ("tied", "parallel", "bert", "bart", "llava")),
    "compiled": ({}, ("llama", "bert", "vit")),
}
CELLS = [(feature, base) for feature, (_, bases) in FEATURES.items() for base in bases]


def gaussian(feature: str, base: str) -> tuple[Any, Rows]:
    """A stock PEFT model with a feature, B not zero, with its A Gaussian."""
    model: Any = BASES[base].make()
    if feature == "bfloat16":
        model = model.bfloat16()
    if feature == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    own = {"r": 4, "lora_alpha": 8, "target_modules": list(BASES[base].targets)}
    config = {**own, **FEATURES[feature][0]}
    if feature == "rank_pattern":
        config |= {"rank_pattern": dict.fromkeys(own["target_modules"][-1:], 2)}
        config |= {"alpha_pattern": {own["target_modules"][0]: 3}}
    torch.manual_seed(1)
    adapted = randomised(get_peft_model(model, LoraConfig(**config)))
    assert bayesify(adapted, init_root_std=0.4) > 0
    return adapted, BASES[base].scorer()


def gradients(model: Any, scorer: Rows) -> dict[str, Tensor]:
    """Of the loss of a training pass, with noise from one seed; LLaVA leaves a layer aside."""
    batch, labels = scorer.batch()
    torch.manual_seed(7)
    model.zero_grad()
    F.cross_entropy(scorer(model.train(), batch), labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("feature", "base"), CELLS)
def test_a_gaussian_adapter_trains_and_draws_beside_what_peft_offers(feature, base, tmp_path):
    model, scorer = gaussian(feature, base)
    found = gradients(model, scorer)
    roots = [gradient for name, gradient in found.items() if name.endswith("root_std")]
    assert roots
    assert all(gradient.any() for gradient in roots)
    tolerance = {"rtol": 0.05, "atol": 0.05} if feature == "bfloat16" else CLOSER
    batch, _ = scorer.batch("evaluation")
    if feature == "checkpointing":
        model.gradient_checkpointing_disable()
        plain = gradients(model, scorer)
        assert_close(found, plain, rtol=1e-3, atol=1e-6)
    if feature == "compiled":
        compiled = torch.compile(copy.deepcopy(model), backend="eager")
        assert_close(list(gradients(compiled, scorer).values()), list(found.values()), **CLOSER)
    posterior = Gaussian(model.eval(), scorer)
    logits = posterior.logits(batch, Draws(3))
    assert logits.std(0).max() > 1e-2
    assert_close(logits, one_by_one(posterior, batch, Draws(3)), **tolerance)
    loaded = load_posterior(fresh(feature, base), save_posterior(posterior, tmp_path / "a"), scorer)
    assert torch.equal(loaded.logits(batch, Draws(3)), logits)
    plain = PeftModel.from_pretrained(
        fresh(feature, base), export_draw(posterior, 1, tmp_path / "b")
    )
    with torch.no_grad():
        assert_close(scorer(plain.eval(), batch), logits[1], **tolerance)


def fresh(feature: str, base: str) -> Any:
    """The base alone."""
    model = BASES[base].make()
    return model.bfloat16() if feature == "bfloat16" else model


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "dora": ("llama", {"use_dora": True}, "variant DoraLinearVariant"),
    "embedding": ("bert", {"target_modules": ["word_embeddings"]}, "it adapts an embedding"),
    "convolution": ("vit", {"target_modules": ["projection", "patch_embedding"]}, "a convolution"),
    "experts": (
        "experts",
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
        "it adapts a bare parameter",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_gaussian_is_refused_by_name(case):
    base, config, message = REFUSED[case]
    own = {"r": 4, "target_modules": list(BASES[base].targets)}
    model = get_peft_model(BASES[base].make(), LoraConfig(**{**own, **config}))
    with pytest.raises(Refusal, match=message):
        bayesify(model)


def test_every_method_meets_three_bases_and_every_base_three_methods():
    assert set(Counter(method for method, _ in PAIRS).values()) == {3}
    assert len(set(PAIRS)) == len(PAIRS)
    assert min(Counter(base for _, base in PAIRS).values()) >= 3
