"""Writes a tiny Llama as a directory and as a GGUF file."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from tiny import byte_level_tokenizer, tiny_llama

WHEEL = "tiny-gguf==1.0"
TEXT = "the label of red"


def tokenizer_with(**special):
    """The tiny tokenizer with these special tokens only."""
    backend = byte_level_tokenizer().backend_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def small(**changes):
    """A tiny Llama with grouped heads, and logits far apart, so that agreement is no accident."""
    sizes = {"vocab_size": len(byte_level_tokenizer()), "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5}
    return tiny_llama(**{**sizes, **heads, "tie_word_embeddings": True, **changes}).eval()


def save_directory(folder, **special):
    small().save_pretrained(folder)
    tokenizer_with(**(special or {"bos_token": "<s>", "eos_token": "</s>"})).save_pretrained(folder)
    return folder


def left(folder):
    """The names in a folder."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def write_gguf(model, path):
    """What llama.cpp's converter writes of a Llama."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(byte_level_tokenizer().backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([3, 3, 3] + [1] * (config.vocab_size - 3))
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, value in model.state_dict().items():
        weight = value
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        kind = key.split(".")[-2]
        if kind in heads:
            # GGUF pairs neighbours in rotary embeddings, Hugging Face pairs halves
            paired = weight.view(heads[kind], 2, -1, weight.shape[1]).transpose(1, 2)
            weight = paired.reshape_as(weight)
        writer.add_tensor(names.get_name(key, (".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
