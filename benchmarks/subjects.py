"""What is measured: models over one set of base weights, their training steps, and batches of real prompts."""

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
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from bayestune.adapters import bayesify
from bayestune.data import Question, Task, load_task
from bayestune.kl import KLStep
from bayestune.models import LoadedModel, load_model
from bayestune.scoring import LetterScorer, Scorer

STOCK = "lora"  # every other name of an adapter is a kind of BLoB's noise
PRECISIONS = ("fp32", "bf16")
DTYPES = ("float32", "bfloat16")
MANY_STEPS = 100_000  # of the KL's plan: more than any benchmark takes, or the KL step would stop
SIZES = {
    "layers": 10,
    "hidden": 576,
    "intermediate": 1536,
    "heads": 9,
    "kv_heads": 3,
    "vocab": 49152,
}
Loss = Callable[[nn.Module, int], Tensor]


def add_model_options(parser: ArgumentParser, *, required: bool = False) -> None:
    """Options of the model: a real one by name, or a random Llama's sizes."""
    text = "directory or name of a real model" + (
        "" if required else "; left out: a Llama with random weights"
    )
    parser.add_argument("--model", default=None, required=required, help=text)
    parser.add_argument("--rank", type=int, default=8, help="of the adapters on q_proj and v_proj")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the base weights")
    if not required:
        for name, size in SIZES.items():
            parser.add_argument(f"--{name}", type=int, default=size, help="of the random Llama")


def random_llama(options: Namespace) -> LlamaForCausalLM:
    """A Llama with random weights and an untied head."""
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def base_model(options: Namespace, device: torch.device) -> nn.Module:
    """The model that the options name."""
    model = random_llama(options) if options.model is None else load_model(options.model).model
    return model.to(device, getattr(torch, options.dtype))


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules over the very same parameters and buffers."""
    return copy.deepcopy(
        model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    )


def adapt(model: nn.Module, adapter: str, rank: int) -> PeftModel:
    """A stock PEFT model in training mode; with a kind of noise for `adapter` its A is Gaussian."""
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    if not adapter.startswith(STOCK):
        bayesify(adapted, noise=adapter)  # type: ignore[arg-type]
    return adapted.train()  # type: ignore[return-value]


def adapt_all(model: nn.Module, adapters: Sequence[str], rank: int) -> dict[str, PeftModel]:
    """An adapted model for each name, all over the weights of `model`."""
    bases = [model, *(twin(model) for _ in adapters[1:])]
    return {
        adapter: adapt(base, adapter, rank) for adapter, base in zip(adapters, bases, strict=True)
    }


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 for "bf16", nothing for "fp32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@dataclass(frozen=True)
class TrainingStep:
    """Forward pass, backward pass, AdamW's step with the KL step hooked to it for BLoB, and gradients freed."""

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
    """The step of an adapted model, with the optimiser that transformers.Trainer takes by default."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = adamw(trainable)
    if not adapter.startswith(STOCK):
        KLStep(period=100).attach(model, optimizer, total_steps=MANY_STEPS)
    return TrainingStep(model, optimizer, loss, trainable[0].device, precision)


def random_tokens(vocabulary: int, rows: int, length: int, device: torch.device) -> Tensor:
    """A batch of random token ids (rows, length)."""
    return torch.randint(vocabulary, (rows, length), device=device)


def token_loss(ids: Tensor, logits: str) -> Loss:
    """The loss of the next token: at all positions for "full", at the last one, all else not computed, for "last"."""
    targets = ids.roll(-1, 1)

    def full(model: nn.Module, _: int) -> Tensor:
        values = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(values.flatten(0, 1).float(), targets.flatten())

    def last(model: nn.Module, _: int) -> Tensor:
        values = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return F.cross_entropy(values[:, -1].float(), targets[:, -1])

    return full if logits == "full" else last


@dataclass(frozen=True)
class Prompts:
    """Batches of a task's real prompts for a real model."""

    model: nn.Module
    scorer: Scorer
    batches: list[dict[str, Tensor]]

    @property
    def mean_length(self) -> float:
        """Tokens a row, padding included, on average over the batches."""
        return sum(batch["input_ids"].shape[1] for batch in self.batches) / len(self.batches)


def add_prompt_options(parser: ArgumentParser, rows: int) -> None:
    """Options of the task and its batches."""
    parser.add_argument("--task", default="arc_easy", help="whose prompts")
    parser.add_argument(
        "--data_root", type=Path, default=None, help="folder of the data sets; left out: the Hub"
    )
    parser.add_argument("--rows", type=int, default=rows, help="of a batch")
    parser.add_argument("--batches", type=int, default=12, help="different ones, used in turn")


def real_task(options: Namespace, device: torch.device) -> tuple[LoadedModel, Task]:
    """The model and the task that the options name; of its evaluation part, seeded rows for the batches."""
    task = load_task(options.task, options.data_root)
    loaded = load_model(options.model, device=device, dtype=getattr(torch, options.dtype))
    return loaded, task.subset(evaluation=options.rows * options.batches, seed=options.seed)


def batches_of(
    scorer: Scorer, part: str, options: Namespace, device: torch.device
) -> list[dict[str, Tensor]]:
    """Batches of the first rows of a task's part."""
    rows: Sequence[Question] = getattr(scorer.task, part)[: options.rows * options.batches]
    encoded = scorer.encode(rows)
    groups = [
        encoded[i : i + options.rows]
        for i in range(0, len(encoded) - options.rows + 1, options.rows)
    ]
    if not groups:
        raise ValueError(
            f"no batch: got {len(rows)} {part} rows of {options.task}, expected {options.rows} or more"
        )
    return [on(device, scorer.collate(group)) for group in groups]


def on(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
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
        batch = prompts.batches[turn % len(prompts.batches)]
        value = F.cross_entropy(prompts.scorer(model, batch), batch["labels"])
        if not math.isfinite(value.item()):
            raise FloatingPointError(f"the loss is {value.item()} at turn {turn}")
        return value

    return loss
