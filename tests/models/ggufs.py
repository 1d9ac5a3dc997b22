"""Writes a tiny Llama as a directory and as a GGUF file."""

import json

import numpy as np
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
    """What llama.cpp's converter writes of a Llama: an oracle without any code of the reader."""
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
    for name, tensor in gguf_tensors(model).items():
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(tensor.detach().float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model):
    def interleaved(weight, heads):
        # GGUF pairs neighbours in rotary embeddings, Hugging Face pairs halves
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape_as(weight)

    config = model.config
    tensors = {
        "token_embd": model.model.embed_tokens.weight,
        "output_norm": model.model.norm.weight,
    }
    if not config.tie_word_embeddings:
        tensors["output"] = model.lm_head.weight
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        q = interleaved(attention.q_proj.weight, config.num_attention_heads)
        k = interleaved(attention.k_proj.weight, config.num_key_value_heads)
        tensors |= {
            f"blk.{i}.attn_q": q,
            f"blk.{i}.attn_k": k,
            f"blk.{i}.attn_v": attention.v_proj.weight,
            f"blk.{i}.attn_output": attention.o_proj.weight,
            f"blk.{i}.ffn_gate": layer.mlp.gate_proj.weight,
            f"blk.{i}.ffn_up": layer.mlp.up_proj.weight,
            f"blk.{i}.ffn_down": layer.mlp.down_proj.weight,
            f"blk.{i}.attn_norm": layer.input_layernorm.weight,
            f"blk.{i}.ffn_norm": layer.post_attention_layernorm.weight,
        }
    return tensors
