"""What is measured: models over one set of base weights, their training steps, real prompts."""

import copy
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from bayestune.adapters import Lora, attach, bayesify
from bayestune.data import Question, Task, load_task
from bayestune.kl import KLStep
from bayestune.models import LoadedModel, load_model
from bayestune.scoring import LetterScorer, Scorer
from harness import named

STOCK = "lora"  # every other name of an adapter is a kind of BLoB's noise
OURS = "row"
PRECISIONS = ("fp32", "bf16")
DTYPES = ("float32", "bfloat16")
TARGETS = ("q_proj", "v_proj")
MANY_STEPS = 100_000  # of the KL's plan: more than any benchmark takes, or the KL step would stop
SIZES = {  # of the random Llama: the config's name, the option, its default
    "vocab_size": ("vocab", 49152),
    "hidden_size": ("hidden", 576),
    "intermediate_size": ("intermediate", 1536),
    "num_hidden_layers": ("layers", 10),
    "num_attention_heads": ("heads", 9),
    "num_key_value_heads": ("kv_heads", 3),
}
Loss = Callable[[nn.Module, int], Tensor]
Batch = dict[str, Tensor]


# Options


def add_model_options(parser: ArgumentParser, *, required: bool = False) -> None:
    """Options of the model: a real one by name, or a random Llama's sizes; and its precisions."""
    add = parser.add_argument
    left_out = "" if required else "; left out: a Llama with random weights"
    text = f"directory or name of a real model{left_out}"
    add("--model", default=None, required=required, help=text)
    add("--rank", type=int, default=8, help="of the adapters on q_proj and v_proj")
    add("--dtype", choices=DTYPES, default="float32", help="of the base weights")
    add("--precisions", choices=PRECISIONS, nargs="+", default=list(PRECISIONS), help="each a line")
    if not required:
        for name, size in SIZES.values():
            add(f"--{name}", type=int, default=size, help="of the random Llama")


def add_prompt_options(parser: ArgumentParser, rows: int) -> None:
    """Options of the task and its batches."""
    add = parser.add_argument
    add("--task", default="arc_easy", help="whose prompts")
    add("--data_root", type=Path, default=None, help="folder of the data sets; left out: the Hub")
    add("--rows", type=int, default=rows, help="of a batch")
    add("--batches", type=int, default=12, help="different ones, used in turn")


def model_name(options: Namespace) -> str:
    """The model in titles."""
    if options.model is not None:
        return named(options.model)
    return f"random Llama, {options.layers} layers of {options.hidden}"


# Models


def random_llama(options: Namespace) -> LlamaForCausalLM:
    """A Llama with random weights and an untied head."""
    sizes = {name: getattr(options, option) for name, (option, _) in SIZES.items()}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))


def base_model(options: Namespace, device: torch.device) -> nn.Module:
    """The model that the options name."""
    model = random_llama(options) if options.model is None else load_model(options.model).model
    return model.to(device, getattr(torch, options.dtype))


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules over the very same parameters and buffers."""
    shared = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def adapt(
    model: nn.Module,
    adapter: str,
    rank: int,
    targets: Sequence[str] = TARGETS,
    dropout: float = 0.0,
) -> PeftModel:
    """A stock PEFT model in training mode; with a kind of noise for `adapter` its A is Gaussian."""
    adapted = attach(model, Lora(rank, 2 * rank, dropout, tuple(targets)))
    if not adapter.startswith(STOCK):
        bayesify(adapted, noise=adapter)  # type: ignore[arg-type]
    return adapted.train()


def adapt_all(
    model: nn.Module, adapters: Sequence[str], rank: int, dropout: float = 0.0
) -> dict[str, PeftModel]:
    """An adapted model for each name, all over the weights of `model`."""
    bases = [model, *(twin(model) for _ in adapters[1:])]
    return {
        name: adapt(base, name, rank, dropout=dropout)
        for name, base in zip(adapters, bases, strict=True)
    }


# Training steps


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 for "bf16", nothing for "fp32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@dataclass(frozen=True)
class TrainingStep:
    """Forward pass, backward pass, AdamW's step (with the KL step for BLoB), gradients freed."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    device: torch.device
    precision: str

    def __call__(self, turn: int) -> None:
        """Takes the step of one turn."""
        with autocast(self.device, self.precision):
            loss = self.loss(self.model, turn)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def adamw(parameters: Sequence[nn.Parameter]) -> torch.optim.AdamW:
    """The optimiser that transformers.Trainer takes by default."""
    return torch.optim.AdamW(parameters, lr=1e-4, eps=1e-6, weight_decay=0.0, fused=True)


def training_step(model: nn.Module, adapter: str, loss: Loss, precision: str) -> TrainingStep:
    """The step of an adapted model."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = adamw(trainable)
    if not adapter.startswith(STOCK):
        KLStep(period=100).attach(model, optimizer, total_steps=MANY_STEPS)
    return TrainingStep(model, optimizer, loss, trainable[0].device, precision)


def random_tokens(vocabulary: int, rows: int, length: int, device: torch.device) -> Tensor:
    """A batch of random token ids (rows, length)."""
    return torch.randint(vocabulary, (rows, length), device=device)


def token_loss(ids: Tensor, logits: str) -> Loss:
    """The loss of the next token.

    Args:
        ids: tokens (N, T).
        logits: "full" for all positions; "last" for the last one, the others' logits not computed.
    """
    targets = ids.roll(-1, 1)

    def full(model: nn.Module, _: int) -> Tensor:
        values = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(values.flatten(0, 1).float(), targets.flatten())

    def last(model: nn.Module, _: int) -> Tensor:
        values = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return F.cross_entropy(values[:, -1].float(), targets[:, -1])

    return full if logits == "full" else last


# Real prompts


@dataclass(frozen=True)
class Prompts:
    """Batches of a task's real prompts for a real model."""

    model: nn.Module
    scorer: Scorer
    batches: list[Batch]

    def batch(self, turn: int) -> Batch:
        """The batch of one turn."""
        return self.batches[turn % len(self.batches)]

    @property
    def mean_length(self) -> float:
        """Tokens a row, padding included, on average over the batches."""
        return sum(batch["input_ids"].shape[1] for batch in self.batches) / len(self.batches)


def real_task(options: Namespace, device: torch.device) -> tuple[LoadedModel, Task]:
    """The model and the task that the options name, with seeded evaluation rows for the batches."""
    task = load_task(options.task, options.data_root)
    loaded = load_model(options.model, device=device, dtype=getattr(torch, options.dtype))
    return loaded, task.subset(evaluation=options.rows * options.batches, seed=options.seed)


def batches_of(scorer: Scorer, part: str, options: Namespace, device: torch.device) -> list[Batch]:
    """Batches of the first rows of a task's part.

    Raises:
        ValueError: if there are fewer rows than one batch has.
    """
    rows: Sequence[Question] = getattr(scorer.task, part)[: options.rows * options.batches]
    encoded = scorer.encode(rows)
    starts = range(0, len(encoded) - options.rows + 1, options.rows)
    if not starts:
        raise ValueError(
            f"no batch: got {len(rows)} {part} rows of {options.task}, expected {options.rows} or "
            "more; lower --rows"
        )
    return [on(device, scorer.collate(encoded[i : i + options.rows])) for i in starts]


def on(device: torch.device, batch: Batch) -> Batch:
    """The batch on the device."""
    return {name: value.to(device) for name, value in batch.items()}


def real_prompts(options: Namespace, device: torch.device, part: str) -> Prompts:
    """Batches of seeded rows of the task's "train" or "evaluation" part."""
    loaded, task = real_task(options, device)
    scorer = LetterScorer(loaded.tokenizer, task)
    return Prompts(loaded.model, scorer, batches_of(scorer, part, options, device))


def task_loss(prompts: Prompts) -> Loss:
    """What `ClassTrainer` computes: cross-entropy over the options' logits, checked for NaN."""

    def loss(model: nn.Module, turn: int) -> Tensor:
        batch = prompts.batch(turn)
        value = F.cross_entropy(prompts.scorer(model, batch), batch["labels"])
        if not math.isfinite(value.item()):
            raise FloatingPointError(f"the loss is {value.item()} at turn {turn}")
        return value

    return loss
