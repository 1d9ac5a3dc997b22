"""Fits an adapter by maximum likelihood: the settings of a training, its start and its run."""

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed

from bayestune.adapters import Lora, attach
from bayestune.data import check_trainable
from bayestune.posteriors import FitReport
from bayestune.runtime import peak_memory_mb, reset_peak_memory
from bayestune.scoring import Scorer, TextScorer
from bayestune.training.callbacks import Interrupted, StopOnSignal
from bayestune.training.cpu_attention import eager_attention, trains_faster_eagerly
from bayestune.training.trainer import ClassTrainer

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Training:
    """How an adapter is trained: the paper's settings by default.

    Args:
        lora: the adapter.
        steps: optimiser steps.
        epochs: passes over the training rows, instead of `steps` where given.
        batch_size: rows of one forward pass.
        accumulation: forward passes of one optimiser step.
        learning_rate: of AdamW, at its peak.
        warmup_ratio: the part of the steps with linear warm-up; then linear decay to 0.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm; 0 for no clipping.
        seed: of the adapter's start, the noise and the order of the rows.
        bf16: bfloat16 autocast over float32 adapters.
        gradient_checkpointing: recompute activations in the backward pass.
        group_by_length: batches of rows of like length, so that less is padded; in random order.
        save_steps: a checkpoint every so many steps; None for none but at ctrl-C.
        logging_steps: a log line every so many steps.
        output: where checkpoints go; None for a temporary folder.
        resume: go on from the newest whole checkpoint in `output`.
        progress: show a progress bar.
    """

    lora: Lora = field(default_factory=Lora)
    steps: int = 5000
    epochs: float | None = None
    batch_size: int = 4
    accumulation: int = 1
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    seed: int = 1
    bf16: bool = False
    gradient_checkpointing: bool = False
    group_by_length: bool = field(default=False, metadata={"absent_means": False})
    save_steps: int | None = field(default=None, metadata={"changes_result": False})
    logging_steps: int = field(default=25, metadata={"changes_result": False})
    output: Path | None = field(default=None, metadata={"changes_result": False})
    resume: bool = field(default=False, metadata={"changes_result": False})
    progress: bool = field(default=True, metadata={"changes_result": False})

    def total_steps(self, num_rows: int) -> int:
        """Optimiser steps of a run over `num_rows` rows."""
        if self.epochs is None:
            return self.steps
        return math.ceil(
            self.epochs * math.ceil(math.ceil(num_rows / self.batch_size) / self.accumulation)
        )


def start_adapter(model: nn.Module, training: Training) -> nn.Module:
    """The PEFT model with a fresh adapter, the same for the same seed."""
    set_seed(training.seed)
    return attach(model, training.lora)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; one that a kill cut short is passed over."""
    whole = [
        path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()
    ]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def train(
    model: nn.Module,
    scorer: Scorer,
    training: Training,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    optimizer: Optimizer | None = None,
) -> FitReport:
    """Trains the adapters of a PEFT model on the scorer's training rows.

    Args:
        model: a PEFT model; trained in place.
        scorer: the task, bound to the tokenizer.
        training: steps, rates and the rest.
        callbacks: such as `KLStep`.
        optimizer: makes the optimiser of the trainable parameters; None for AdamW as `training` says.

    Returns:
        Time, steps, log and peak memory.

    Raises:
        ValueError: if there is nothing to train on.
        NotFiniteError: if the loss is NaN or infinite.
        Interrupted: at ctrl-C, after a checkpoint.
    """
    reset_peak_memory()
    check_trainable(scorer.task)
    rows = scorer.encode(scorer.task.train)
    stop = StopOnSignal()
    with tempfile.TemporaryDirectory() as scratch:
        folder = training.output or Path(scratch)
        arguments = _arguments(training, folder, training.total_steps(len(rows)))
        own = optimizer([p for p in model.parameters() if p.requires_grad]) if optimizer else None
        trainer = ClassTrainer(
            model,
            scorer,
            group_by_length=training.group_by_length,
            args=arguments,
            train_dataset=rows,
            callbacks=[*callbacks, stop],
            optimizers=(own, None),
        )
        checkpoint = newest_checkpoint(folder) if training.resume else None
        begin = time.perf_counter()
        with eager_attention(model, _eagerly(model, scorer, rows, training)):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = time.perf_counter() - begin
        if stop.stopped:
            raise Interrupted(f"stopped at step {trainer.state.global_step}; go on with --resume")
    return FitReport(
        seconds, trainer.state.global_step, list(trainer.state.log_history), peak_memory_mb()
    )


def _eagerly(
    model: nn.Module, scorer: Scorer, rows: Sequence[dict[str, Any]], training: Training
) -> bool:
    """Whether to train with eager attention; packed rows bring a mask that was made for the model's own."""
    packed = isinstance(scorer, TextScorer) and scorer.layout == "packed"
    longest = max(row.get("length", math.inf) for row in rows)
    return not packed and trains_faster_eagerly(model, longest, bf16=training.bf16)


def _arguments(training: Training, folder: Path, steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=os.fspath(folder),
        max_steps=steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.accumulation,
        learning_rate=training.learning_rate,
        warmup_steps=int(training.warmup_ratio * steps),
        lr_scheduler_type="linear",
        weight_decay=training.weight_decay,
        adam_epsilon=1e-6,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        bf16=training.bf16,
        use_cpu=not torch.accelerator.is_available(),
        gradient_checkpointing=training.gradient_checkpointing,
        save_strategy="steps" if training.save_steps else "no",
        save_steps=training.save_steps or steps,
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,  # it would ask the device in every step; LossWatch asks later
        disable_tqdm=not training.progress,
        report_to=[],
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def adamw(training: Training, own: Sequence[nn.Parameter], learning_rate: float) -> Optimizer:
    """AdamW as `training` says, but for parameters that have a learning rate of their own and no weight decay."""

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        ids = {id(parameter) for parameter in own}
        rest = [parameter for parameter in parameters if id(parameter) not in ids]
        groups = [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": training.weight_decay},
            {"params": [p for p in rest if p.dim() <= 1]},
            {"params": list(own), "lr": learning_rate},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=training.learning_rate, eps=1e-6, weight_decay=0.0)

    return make
