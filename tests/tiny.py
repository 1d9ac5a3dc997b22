"""Tiny models, tokenizers and tasks with seeded random weights; nothing here needs a network."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from bayestune import Question, Task
from bayestune.adapters import Slots, bayesify
from bayestune.adapters.noise import random_signs
from bayestune.data import Prompt
from bayestune.data.prompts import CHOICES
from bayestune.forward import Batch, Draws
from bayestune.posteriors import AdapterPosterior, Mixture
from bayestune.scoring import LetterScorer, Scorer, TextScorer

WORDS = (
    "Question Answer Choices Passage Return the label of correct answer for question below "
    "red green blue A B C D E"
)
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
    """Twelve training, six held-out and six evaluation sentences of three classes.

    Every second one has a context.
    """
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


# Models with adapters, and oracles for their draws

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BATCH = {"input_ids": torch.arange(3, 27).reshape(2, 12)}
TARGETS = ["q_proj", "v_proj", "c_attn", "query_key_value"]
WIDE = {**SIZES, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDE |= {"initializer_range": 0.2, "max_position_embeddings": 512}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
GPT2 = GPT2Config(vocab_size=400, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2, **ENDS)
CAUSAL = {"llama": LlamaConfig(**WIDE), "qwen2": Qwen2Config(**WIDE), "gpt2": GPT2}


def causal(config: PretrainedConfig) -> nn.Module:
    """A language model of seeded random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def randomised(model: nn.Module) -> nn.Module:
    """Gives each B weights that are not zero, so that A reaches the output; evaluation mode."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def adapted(base: nn.Module, adapter_name: str = "default", **config: Any) -> PeftModel:
    """LoRA on attention with B not zero, in evaluation mode; `config` changes the LoraConfig."""
    torch.manual_seed(1)
    lora = LoraConfig(**{"target_modules": TARGETS, "task_type": "CAUSAL_LM", **config})
    return randomised(get_peft_model(base, lora, adapter_name))


def converted(
    base: nn.Module, root_std: float = 0.5, slots: Sequence[str] | None = None, **config: Any
) -> PeftModel:
    """As `adapted`, with A Gaussian in some slots, None for all."""
    model = adapted(base, **config)
    bayesify(model, init_root_std=root_std, slots=slots)
    return model


def with_second(model: PeftModel, **changes: Any) -> PeftModel:
    """The model with an adapter "b" beside its first one, which stays active; evaluation mode.

    "b" has the settings of the first, some of them changed, and weights and heads of its own.
    """
    first = model.peft_config[model.active_adapter]
    model.add_adapter("b", replace(copy.deepcopy(first), **changes))
    slots = Slots(model, "b")
    torch.manual_seed(5)
    for module in (*slots.modules().values(), *slots.heads.values()):
        nn.init.normal_(module.weight, std=0.3)
    return model.eval()


def end_logits(model: nn.Module, batch: Batch) -> Tensor:
    """A scorer: five logits (N, 5) at the end of each row."""
    return model(**batch).logits[:, -1, :5]


def one_by_one(posterior: AdapterPosterior | Mixture, batch: Batch, draws: Draws) -> Tensor:
    """The draws' logits (S, N, C), each from a copy of the model that has its weights."""
    found = []
    for index in draws.indices:
        model = copy.deepcopy(posterior.model).eval()
        slots = Slots(model, posterior.adapter).modules()
        with torch.no_grad():
            for name, weight in posterior.draw(index, draws.seed).items():
                slots[name].weight.copy_(weight)
            found.append(posterior.scorer(model, batch))
    return torch.stack(found)


def passes(model: nn.Module) -> list[tuple[int, int]]:
    """The shapes (rows, tokens) of all passes through the first block from now on."""
    seen = []

    def see(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(tuple(hidden.shape[:2]))

    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    blocks[0].register_forward_pre_hook(see, with_kwargs=True)
    return seen


RAGGED = (
    Question("a", "what is red?", ("red", "the blue sky and grass", "green"), 1),
    Question("b", "what is the question for the answer and the passage below?", ("sky", "red"), 0),
    Question("c", "is sky?", ("green grass", "red", "the", "Return the label"), 3),
    Question("d", "the grass and sky?", ("red", "the blue sky"), 0),
)
_SHOT = "Question: what is red and what is green?\nChoices:\nA) the sky\nB) grass\nAnswer: B\n\n"
_ASKED = _SHOT + "Question: {question}\n"
SHOT = Prompt(letter=_ASKED + "Choices:\n{choices}\nAnswer:", text=_ASKED + "Answer:")


def ragged_batches(
    tokenizer: PreTrainedTokenizerFast, kind: str, groups: Sequence[Sequence[int]]
) -> tuple[Scorer, list[Batch]]:
    """A scorer and batches of `RAGGED`, which all begin with the same example.

    Args:
        tokenizer: of the tasks' words.
        kind: "letter", or a layout of text scoring.
        groups: which rows make each batch.
    """
    task = Task("ragged", RAGGED, (), prompt=SHOT)
    scorer = LetterScorer(tokenizer, task)
    if kind != "letter":
        scorer = TextScorer(tokenizer, task, layout=kind)
    batches = [scorer.collate(scorer.encode([RAGGED[i] for i in group])) for group in groups]
    for batch in batches:
        batch.pop("labels")
    return scorer, batches


def row_weights(mean: Tensor, std: Tensor, num_rows: int) -> Tensor:
    """The law of training noise, plainly: A_n = M + (s_n t_nᵀ) ∘ (Ω∘E), (N, r, k).

    All rows share E.
    """
    rank, width = mean.shape
    signs = random_signs(num_rows, rank + width, like=mean)
    outer = signs[:, :rank, None] * signs[:, None, rank:]
    return torch.addcmul(mean, outer, std * torch.randn_like(mean))
