"""Tiny models, tokenizers and tasks with seeded random weights; nothing here needs a network."""

from dataclasses import replace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from bayestune import Question, Task
from bayestune.adapters.noise import random_signs
from bayestune.data.prompts import CHOICES

WORDS = "Question Answer Choices Passage Return the label of correct answer for question below red green blue A B C D E"
SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}


def corpus() -> list[str]:
    """Text that holds all words of the tiny tasks."""
    letters = [f"Choices:\n{x}) red\nAnswer: {x}" for x in "ABCDE"]
    words = [
        f"{WORDS} what is {a} and {b}? True False"
        for a in ("red", "green", "blue")
        for b in ("sky", "grass")
    ]
    return (letters + words) * 20


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's kind: byte-level BPE, where a word carries its leading space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=512,
    )


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Llama's kind: ▁ for a space, one put before the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    """A decoder of two layers."""
    torch.manual_seed(0)
    own = {
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **own, **changes}))


def tiny_bert(**changes: object) -> BertForSequenceClassification:
    """An encoder of two layers with a fresh head of three classes."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**{**SIZES, "num_labels": 3, **changes}))


def labelled_sentences() -> Task:
    """Twelve training, six held-out and six evaluation sentences of three classes, some with a context."""
    colours = ("red", "green", "blue")

    def row(i: int) -> Question:
        text = f"what is {colours[i % 3]} and {'red ' * (i // 3)}{WORDS.split()[i % 9]}?"
        return Question(f"s{i}", text, colours, i % 3, "the sky" if i % 2 else "")

    rows = tuple(row(i) for i in range(24))
    return Task("labelled", rows[:12], rows[18:], rows[12:18])


def coloured_questions() -> Task:
    """Twelve training, four held-out and six evaluation questions with three or four options."""
    colours = ("red", "green", "blue", "the sky")

    def row(i: int) -> Question:
        options = colours if i % 3 else colours[:3]
        return Question(
            f"q{i}",
            f"what is {colours[i % 4]} and {colours[(i + 1) % 4]}?",
            options,
            i % len(options),
        )

    rows = tuple(row(i) for i in range(18))
    held_out = tuple(
        replace(row(i), id=f"h{i}", question=f"and what is {colours[i % 4]}?") for i in range(4)
    )
    return Task("tiny", rows[:12], rows[12:], held_out, prompt=CHOICES)


def row_weights(mean: torch.Tensor, std: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The law of training noise, plainly: A_n = M + (s_n t_nᵀ) ∘ (Ω∘E), E shared by the rows, (N, r, k)."""
    rank, width = mean.shape
    signs = random_signs(num_rows, rank + width, like=mean)
    outer = signs[:, :rank, None] * signs[:, None, rank:]
    return torch.addcmul(mean, outer, std * torch.randn_like(mean))
