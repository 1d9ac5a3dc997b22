"""A saved folder gives back what was fitted: every option of LoRA, every way to save; or refuses."""

import copy
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from bayestune import (
    Draws,
    Gaussian,
    KLStep,
    Mixture,
    Point,
    bayesify,
    export_draw,
    load_posterior,
    predict,
    save_posterior,
)
from bayestune.adapters import TENSORS, Slots
from bayestune.posteriors import DETAILS, Posterior, PosteriorError, load_adapter, read_details
from tiny import BATCH, GPT2, WIDE, causal, end_logits, tiny_bert, tiny_llama, with_second
from transformers import LlamaConfig, Qwen2Config

QV = ["q_proj", "v_proj"]
Make = Callable[[], nn.Module]


def fitted(base: nn.Module, name: str = "default", seed: int = 3, **lora: Any) -> PeftModel:
    """A converted model all of whose trainable numbers have moved."""
    config = {"r": 4, "target_modules": QV, "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(base, LoraConfig(**config), name)
    bayesify(model)
    return moved(model, seed)


def moved(model: PeftModel, seed: int = 3) -> PeftModel:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "root_std" in name:
                parameter.uniform_(0.2, 0.4)
            elif parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def classes(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


def scorer_of(model: nn.Module) -> Any:
    return end_logits if hasattr(model.config, "tie_word_embeddings") and _speaks(model) else classes


def _speaks(model: nn.Module) -> bool:
    return model.get_output_embeddings() is not None


def qwen2() -> nn.Module:
    return causal(Qwen2Config(**WIDE))


def tied() -> nn.Module:
    return causal(LlamaConfig(**WIDE, tie_word_embeddings=True))


def distilbert() -> nn.Module:
    torch.manual_seed(int(torch.randint(1000, ())))  # its head is another each time
    config = DistilBertConfig(vocab_size=400, dim=32, hidden_dim=64, n_layers=2, n_heads=2)
    model = DistilBertForSequenceClassification(config)
    torch.manual_seed(0)
    for parameter in model.distilbert.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


PATHS = {"model.layers.0.self_attn.q_proj": 2}
OPTIONS: dict[str, tuple[Make, dict[str, Any]]] = {
    "lora_bias": (tiny_llama, {"lora_bias": True}),
    "bias all": (qwen2, {"bias": "all"}),
    "bias lora_only": (qwen2, {"bias": "lora_only"}),
    "bias all, gpt2": (lambda: causal(GPT2), {"bias": "all", "target_modules": ["c_attn"]}),
    "rsLoRA": (tiny_llama, {"use_rslora": True, "lora_alpha": 3}),
    "ranks": (tiny_llama, {"rank_pattern": PATHS, "use_rslora": True}),
    "alphas": (tiny_llama, {"alpha_pattern": {"v_proj": 40}}),
    "token indices": (tiny_llama, {"trainable_token_indices": [5, 7]}),
    "token indices, tied": (tied, {"trainable_token_indices": {"embed_tokens": [5, 7]}}),
    "norms": (tiny_llama, {"modules_to_save": ["norm"]}),
    "embeddings": (tiny_llama, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "embeddings, tied": (tied, {"modules_to_save": ["embed_tokens"]}),
    "tied head": (tied, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    "head adapted": (tiny_llama, {"target_modules": [*QV, "lm_head"]}),
    "all linear": (tiny_llama, {"target_modules": "all-linear"}),
    "expression": (tiny_llama, {"target_modules": r".*\.1\..*proj"}),
    "some layers": (tiny_llama, {"layers_to_transform": [1]}),
    "excluded": (tiny_llama, {"exclude_modules": ["model.layers.0.self_attn.q_proj"]}),
    "replicated": (tiny_llama, {"layer_replication": [[0, 2], [1, 2]]}),
    "gaussian": (tiny_llama, {"init_lora_weights": "gaussian"}),
    "random B": (tiny_llama, {"init_lora_weights": False}),
    "orthogonal": (tiny_llama, {"init_lora_weights": "orthogonal"}),
    "eva": (tiny_llama, {"init_lora_weights": "eva"}),
    "mica": (tiny_llama, {"init_lora_weights": "mica"}),
    "dropout": (tiny_llama, {"lora_dropout": 0.3}),
    "a trained head": (tiny_bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "a random head": (distilbert, {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    "no task": (tiny_llama, {"task_type": None}),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("way", ["save_posterior", "save_pretrained"])
def test_every_option_comes_back(option, way, tmp_path):
    make, lora = OPTIONS[option]
    base = make()
    ask = scorer_of(base)
    posterior = Gaussian(fitted(base, **lora), ask)
    if way == "save_posterior":
        save_posterior(posterior, tmp_path)
    else:
        posterior.model.save_pretrained(tmp_path)
    expected = [posterior.logits(BATCH, Draws(count)) for count in (0, 3)]
    loaded = load_posterior(make(), str(tmp_path), ask)
    assert loaded.kind == "gaussian"
    again = save_posterior(loaded, tmp_path / "again")
    for one in (loaded, load_posterior(make(), again, ask)):
        got = [one.logits(BATCH, Draws(count)) for count in (0, 3)]
        assert_close(got, expected, rtol=0, atol=1e-6)
    assert (expected[1].std(0) > 1e-4).any()
