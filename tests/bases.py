"""Tiny bases of every kind that LoRA adapts, and rows for each: texts, pictures, sounds, both."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from bayestune import Question, Task
from bayestune.adapters import Lora
from bayestune.scoring import Scorer
from tiny import byte_level_tokenizer

CLASSES = ("red", "green", "blue")
VOCABULARY = 64
IMAGE = 60  # the token that stands for a patch of a picture
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {**DECODER, "num_labels": 3}
UNTIED = {**DECODER, "tie_word_embeddings": False}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 32,
    "init_std": 0.2,
    "dropout": 0.0,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.2,
}
SPEECH = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "conv_dim": (16, 16),
    "conv_kernel": (8, 4),
    "conv_stride": (4, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 32,
    "num_labels": 3,
    "initializer_range": 0.2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
}


def number_of(row: Question) -> int:
    """The row's number, which its label and its inputs are made of."""
    return int(row.id)


def text_of(number: int) -> dict[str, Tensor]:
    """Eight tokens, the last of which depends on the label."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(10, 50, (8,), generator=generator)
    ids[-2:] = 5 + number % 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pair_of(number: int) -> dict[str, Tensor]:
    """A text to encode, and the token that a decoder begins with."""
    return {**text_of(number), "decoder_input_ids": torch.tensor([0])}


def ended_text(number: int) -> dict[str, Tensor]:
    """With the token at its end that BART's head reads."""
    given = text_of(number)
    given["input_ids"][-1] = 2
    return given


def picture_of(number: int) -> dict[str, Tensor]:
    """Noise in which a channel is bright."""
    generator = torch.Generator().manual_seed(number)
    pixels = 0.3 * torch.randn(3, 16, 16, generator=generator)
    pixels[number % 3] += 1.0
    return {"pixel_values": pixels}


def captioned(number: int) -> dict[str, Tensor]:
    """A picture as four tokens before a text that says nothing."""
    ids = torch.tensor([1, *[IMAGE] * 4, 7, 8, 9])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **picture_of(number)}


def sound_of(number: int) -> dict[str, Tensor]:
    """A tone of one of three heights."""
    generator = torch.Generator().manual_seed(number)
    time = torch.arange(400) / 400
    tone = torch.sin(2 * torch.pi * (10, 30, 60)[number % 3] * time)
    return {"input_values": tone + 0.1 * torch.randn(400, generator=generator)}


def at_the_end(logits: Tensor) -> Tensor:
    """The logits of three tokens after the last one."""
    return logits[:, -1, 20:23]


@dataclass(frozen=True)
class Base:
    """A tiny model, what LoRA adapts of it, and how its rows look.

    Args:
        kind: the model's class.
        config: its configuration's class and fields.
        targets: of LoRA.
        inputs: of a row, by its number.
        read: class logits (N, 3) of the model's logits.
    """

    kind: Any
    config: tuple[Any, dict[str, Any]]
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    inputs: Callable[[int], dict[str, Tensor]] = text_of
    read: Callable[[Tensor], Tensor] = field(default=at_the_end)

    def make(self, **changes: Any) -> nn.Module:
        """The same model each time."""
        torch.manual_seed(0)
        config, fields = self.config
        return self.kind(config(**{**fields, **changes})).eval()

    @property
    def lora(self) -> Lora:
        """Of rank 4."""
        return Lora(rank=4, alpha=8, targets=self.targets)

    def scorer(self) -> "Rows":
        """Of twelve rows to train on, and six each held out and to evaluate on."""
        rows = [Question(str(i), f"which colour is {i}?", CLASSES, i % 3) for i in range(24)]
        task = Task("tiny", tuple(rows[:12]), tuple(rows[12:18]), tuple(rows[18:]))
        return Rows(byte_level_tokenizer(), task, base=self)


@dataclass
class Rows(Scorer):
    """A scorer of anybody's rows: what a model is given, stacked."""

    base: Any = None

    def encode_row(self, row: Question) -> dict[str, Any]:
        return {"inputs": self.base.inputs(number_of(row)), "length": 8, "shortened": False}

    def pad_rows(self, rows: Any) -> dict[str, Tensor]:
        names = rows[0]["inputs"]
        return {name: torch.stack([row["inputs"][name] for row in rows]) for name in names}

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        names = ("labels", "shift_labels")
        given = {name: value for name, value in batch.items() if name not in names}
        return self.base.read(model(**given).logits.float())

    def batch(self, part: str = "train") -> tuple[dict[str, Tensor], Tensor]:
        """A batch of all rows of a part, without labels, and the labels."""
        made = self.collate(self.encode(getattr(self.task, part)))
        return made, made.pop("labels")


def classes(logits: Tensor) -> Tensor:
    """A head's logits as they are."""
    return logits


BASES: dict[str, Base] = {
    "llama": Base(hf.LlamaForCausalLM, (hf.LlamaConfig, UNTIED), ("q_proj", "v_proj", "lm_head")),
    "tied": Base(
        hf.Qwen2ForCausalLM,
        (hf.Qwen2Config, {**DECODER, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    ),
    "conv1d": Base(
        hf.GPT2LMHeadModel,
        (
            hf.GPT2Config,
            {
                "vocab_size": VOCABULARY,
                "n_embd": 32,
                "n_layer": 2,
                "n_head": 2,
                "n_positions": 32,
                "initializer_range": 0.2,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
        ),
        ("c_attn",),
    ),
    "fused_qkv": Base(hf.Phi3ForCausalLM, (hf.Phi3Config, UNTIED), ("qkv_proj",)),
    "parallel": Base(hf.GPTNeoXForCausalLM, (hf.GPTNeoXConfig, UNTIED), ("query_key_value",)),
    "experts": Base(
        hf.MixtralForCausalLM,
        (
            hf.MixtralConfig,
            {
                **UNTIED,
                "num_key_value_heads": 2,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
            },
        ),
    ),
    "bert": Base(
        hf.BertForSequenceClassification,
        (hf.BertConfig, ENCODER),
        ("query", "value"),
        read=classes,
    ),
    "modernbert": Base(
        hf.ModernBertForSequenceClassification,
        (hf.ModernBertConfig, {**ENCODER, "cls_token_id": 1, "sep_token_id": 2}),
        ("Wqkv",),
        read=classes,
    ),
    "decoder_head": Base(
        hf.LlamaForSequenceClassification, (hf.LlamaConfig, ENCODER), read=classes
    ),
    "t5": Base(hf.T5ForConditionalGeneration, (hf.T5Config, T5), ("q", "v"), pair_of),
    "bart": Base(
        hf.BartForSequenceClassification,
        (hf.BartConfig, {**SEQ2SEQ, "num_labels": 3, "eos_token_id": 2, "pad_token_id": 0}),
        inputs=ended_text,
        read=classes,
    ),
    "vit": Base(
        hf.ViTForImageClassification,
        (hf.ViTConfig, {**VISION, "num_labels": 3}),
        ("q_proj", "v_proj", "query", "value"),  # newer and older names
        picture_of,
        classes,
    ),
    "llava": Base(
        hf.LlavaForConditionalGeneration,
        (
            hf.LlavaConfig,
            {
                "vision_config": hf.CLIPVisionConfig(**VISION),
                "text_config": hf.LlamaConfig(**UNTIED),
                "image_token_index": IMAGE,
                "image_seq_length": 4,
            },
        ),
        inputs=captioned,
    ),
    "wav2vec2": Base(
        hf.Wav2Vec2ForSequenceClassification,
        (hf.Wav2Vec2Config, SPEECH),
        inputs=sound_of,
        read=classes,
    ),
}
