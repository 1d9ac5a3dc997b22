"""Many draws in one pass are the draws one by one, whatever the model's layers see.

Each family is tried with all slots drawn and with those of its last block, padded on the left and
on the right: decoders, encoders, classifiers, encoder–decoders and vision models; mixtures of
experts, local and sliding attention, ALiBi, relative positions, layers before which time leads.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bayestune.adapters import Slots, bayesify
from bayestune.forward import Batch, Draws
from bayestune.posteriors import Gaussian

DRAWS = Draws(3)
# every name by which a configuration calls a size, each as small as it may be
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "moe_intermediate_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size",), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "d_ff"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_inner"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads"), 2),
    **dict.fromkeys(("num_heads", "encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "image_size"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 130),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "patch_size"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_eos_token_id", "eos_token_id"), 2),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    "vocab_size": 128,
    "rotary_dim": 8,
    "num_channels": 3,
    "n_shared_experts": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "decoder_start_token_id": 1,
    "attention_window": 4,
    "block_sizes": [1, 1],
}
NEO = {"attention_types": [[["global", "local"], 1]], "window_size": 4}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
SHARED = {**RELATIVE, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
SWIN = {"patch_size": 2, "window_size": 2, "depths": [1, 1], "num_heads": [2, 2]}
FAMILIES: dict[str, dict[str, Any]] = {
    # decoders
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 4},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "GemmaForCausalLM": {},
    "Gemma2ForCausalLM": {"sliding_window": 4},
    "PhiForCausalLM": {},
    "Phi3ForCausalLM": {},
    "GPTNeoForCausalLM": NEO,
    "GPTNeoXForCausalLM": {},
    "GPTJForCausalLM": {},
    "GPTBigCodeForCausalLM": {},
    "CodeGenForCausalLM": {"n_head": 4, "rotary_dim": 4},  # its cores are four
    "OPTForCausalLM": {},
    "BloomForCausalLM": {},
    "MptForCausalLM": {},
    "FalconForCausalLM": {"alibi": True},
    "StableLmForCausalLM": {},
    "CohereForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "GraniteForCausalLM": {},
    "Starcoder2ForCausalLM": {},
    # mixtures of experts
    "MixtralForCausalLM": {},
    "Qwen2MoeForCausalLM": {"targets": ["shared_expert.up_proj", "shared_expert.down_proj"]},
    "OlmoeForCausalLM": {},
    # decoders with a classification head
    "LlamaForSequenceClassification": {},
    "Qwen2ForSequenceClassification": {},
    "GPT2ForSequenceClassification": {},
    "BloomForSequenceClassification": {},
    "MptForSequenceClassification": {},
    "GPTNeoForSequenceClassification": NEO,
    # encoders
    "BertForSequenceClassification": {},
    "RobertaForSequenceClassification": {},
    "DistilBertForSequenceClassification": {},
    "ElectraForSequenceClassification": {},
    "AlbertForSequenceClassification": {},
    "MPNetForSequenceClassification": {},
    "ModernBertForSequenceClassification": {"local_attention": 4},
    "RoFormerForSequenceClassification": {},
    "DebertaForSequenceClassification": {"relative_attention": True, "pos_att_type": ["p2c"]},
    "DebertaV2ForSequenceClassification": SHARED,
    "BigBirdForSequenceClassification": {"attention_type": "original_full"},
    "LongformerForSequenceClassification": {},
    "FunnelForSequenceClassification": {},
    "XLNetForSequenceClassification": {},
    "XLMRobertaForSequenceClassification": {},
    "ConvBertForSequenceClassification": {},
    "YosoForSequenceClassification": {},
    # encoders with decoders
    "BartForSequenceClassification": {},
    "T5ForSequenceClassification": {},
    # images
    "ViTForImageClassification": {},
    "SwinForImageClassification": {
        "patch_size": 2,
        "window_size": 2,
        "depths": [1, 1],
        "num_heads": [2, 2],
    },
}
TARGETS = [
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
    ("q", "v"),
    ("in_proj",),
    ("c_attn",),
    ("qkv_proj",),
    ("query_key_value",),
    ("Wqkv",),
]


def tiny(name: str, changes: Mapping[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, name)
    kind = model.config_class
    aliases = getattr(kind, "attribute_map", {})
    names = {*inspect.signature(kind).parameters, *aliases}
    sizes = {key: value for key, value in SIZES.items() if aliases.get(key) not in changes}
    given = {key: value for key, value in sizes.items() if key in names}
    config = kind(**{**given, "num_labels": 3, **changes})
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 1
    return model(config).eval()


def targets_of(model: nn.Module) -> list[str] | str:
    linear = (nn.Linear, Conv1D)
    leaves = {path.split(".")[-1] for path, m in model.named_modules() if isinstance(m, linear)}
    return next((list(names) for names in TARGETS if leaves >= set(names)), "all-linear")


def block_of(name: str) -> int:
    """In which of its blocks a slot is."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def scored(model: nn.Module, batch: Batch) -> Tensor:
    """Three logits: of the classes, or of three tokens at the last position."""
    accepted = inspect.signature(model.get_base_model().forward).parameters
    given: dict[str, Any] = {name: value for name, value in batch.items() if name in accepted}
    given |= {"use_cache": False} if "use_cache" in accepted else {}
    logits = model(**given).logits
    return logits[:, -1, :3] if logits.dim() == 3 else logits


@cache
def model_of(name: str) -> nn.Module:
    """With an adapter for all slots, "all", and one for those of the last block, "late"."""
    changes = dict(FAMILIES[name])
    targets = changes.pop("targets", None)
    base = tiny(name, changes)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets or targets_of(base))
    model = get_peft_model(base, lora, "all")
    model.add_adapter("late", lora)
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(parameter, std=0.3)
    names = Slots(model, "all").names()
    last = max(map(block_of, names))
    late = [name for name in names if block_of(name) == last]
    bayesify(model, init_root_std=0.6, adapter="all")
    bayesify(model, init_root_std=0.6, adapter="late", slots=late)
    return model.eval()


def batch_of(name: str, side: str, length: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if "Image" in name:
        return {"pixel_values": torch.randn(4, 3, 16, 16, generator=generator)}
    ids = torch.randint(4, 128, (4, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in (1, 2):
        mask[row, slice(0, row) if side == "left" else slice(-row, None)] = 0
    last = mask.cumsum(1).argmax(1)
    ids[torch.arange(4), last] = 2  # the end of a sequence, which BART's head reads
    places = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": places}


def one_by_one(posterior: Gaussian, batch: Batch) -> Tensor:
    """Each draw's weights as the adapter's own, in a plain pass."""
    slots = Slots(posterior.model, posterior.adapter).modules()
    weights = [posterior.draw(index) for index in DRAWS.indices]
    means = {name: slots[name].weight.detach().clone() for name in weights[0]}
    found = []
    with torch.no_grad():
        for draw in (*weights, means):
            for name, weight in draw.items():
                slots[name].weight.copy_(weight)
            found.append(scored(posterior.model, batch))
    return torch.stack(found[:-1])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.getLogger("bayestune").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    yield
    logging.getLogger("bayestune").setLevel(logging.NOTSET)


def test_there_are_enough_families():
    assert len(FAMILIES) >= 45


@pytest.mark.parametrize("name", FAMILIES)
def test_each_draw_is_what_it_is_alone(name):
    model = model_of(name)
    spreads = []
    for adapter in ("all", "late"):
        posterior = Gaussian(model, scored, adapter=adapter)
        model.set_adapter(adapter)
        for side in ("left", "right"):
            batch = batch_of(name, side)
            expected = one_by_one(posterior, batch)
            spread = expected.std(0).max().item()
            for draws in (DRAWS, Draws(3, max_rows=8)):  # one pass; two of unequal sizes
                got = posterior.logits(batch, draws)
                assert got.shape == expected.shape
                assert (got - expected).abs().max() <= max(1e-5, 0.01 * spread), (adapter, side)
            spreads.append(spread)
    assert max(spreads) > 1e-2
