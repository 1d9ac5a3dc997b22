"""Fits an adapter: the settings of a training, its start and its run."""

import logging
import math
import os
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from bayestune.adapters import Lora, attach
from bayestune.data import check_trainable
from bayestune.errors import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    WHOLE_PART,
    Refusal,
    check_fields,
)
from bayestune.posteriors import FitReport
from bayestune.runtime import num_processes
from bayestune.scoring import Encoded, Scorer, TextScorer
from bayestune.training.callbacks import LogLines, ReadableCheckpoints, StopOnSignal
from bayestune.training.checkpoints import KnownBase, check_base, start_anew, to_go_on_from
from bayestune.training.cpu_attention import eager_attention, trains_faster_eagerly
from bayestune.training.launched import check_launched
from bayestune.training.meter import Meter
from bayestune.training.trainer import ClassTrainer, LengthGroupedTrainer

logger = logging.getLogger(__name__)

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
"""Makes the optimiser of a PEFT model's trainable parameters."""


@dataclass(frozen=True)
class Training:
    """How an adapter is trained: the paper's settings by default.

    Args:
        lora: the adapter.
        steps: optimiser steps.
        epochs: passes over the training rows, instead of `steps` where given.
        batch_size: rows of one forward pass, of all processes together.
        accumulation: forward passes of one optimiser step.
        learning_rate: AdamW's, at its peak.
        warmup_ratio: the part of the steps with linear warm-up; then linear decay to 0.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this norm; 0 for no clipping.
        seed: what the adapter's start, the noise and the order of the rows are drawn from.
        bf16: compute in bfloat16 (autocast); the adapter stays float32.
        gradient_checkpointing: recompute activations in the backward pass.
        group_by_length: batches of rows of like length, so that less is padded; in random order.
        save_steps: a checkpoint every so many steps; None for one at ctrl-C alone.
        logging_steps: a log line every so many steps.
        output: where checkpoints go; None for a temporary folder.
        resume: continue from the newest whole checkpoint in `output`.
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

    def __post_init__(self) -> None:
        check_fields(self, steps=COUNT, epochs=POSITIVE, batch_size=COUNT, accumulation=COUNT)
        check_fields(self, learning_rate=NOT_NEGATIVE, warmup_ratio=WHOLE_PART, seed=SEED)
        check_fields(self, weight_decay=NOT_NEGATIVE, max_grad_norm=NOT_NEGATIVE)
        check_fields(self, save_steps=COUNT, logging_steps=COUNT)
        if isinstance(self.output, str):
            object.__setattr__(self, "output", Path(self.output).expanduser())

    def total_steps(self, num_rows: int) -> int:
        """Optimiser steps of a run over `num_rows` rows."""
        if self.epochs is None:
            return self.steps
        batches = math.ceil(num_rows / self.batch_size)
        return math.ceil(self.epochs * math.ceil(batches / self.accumulation))


def fit_adapter(
    model: nn.Module,
    scorer: Scorer,
    training: Training,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    prepare: Callable[[nn.Module], object] | None = None,
    optimizer: MakeOptimizer | None = None,
) -> tuple[nn.Module, FitReport]:
    """Puts a fresh adapter on a model and trains it: the beginning and the end of a method's fit.

    Args:
        model: a transformers model without adapters.
        scorer: of the task and the model's tokenizer.
        training: the adapter and how it is trained.
        callbacks: such as `KLStep`.
        prepare: changes the PEFT model before it is trained, as `bayesify` does.
        optimizer: makes the optimiser; None for AdamW as `training` says.

    Returns:
        The PEFT model, and what the training took.

    Raises:
        Refusal: if there is nothing to train on, or a checkpoint is of another base model.
        NotFiniteError: if the loss is NaN or infinite.
        Interrupted: at ctrl-C, after a checkpoint.
    """
    adapted = start_adapter(model, training)
    if prepare is not None:
        prepare(adapted)
    return adapted, train(adapted, scorer, training, callbacks, optimizer=optimizer)


def start_adapter(model: nn.Module, training: Training) -> nn.Module:
    """The PEFT model with a fresh adapter, the same for the same seed.

    Args:
        model: a transformers model without adapters.
        training: the adapter's settings and the seed, to which the process's generators are set.
    """
    set_seed(training.seed)
    return attach(model, training.lora)


def train(
    model: nn.Module,
    scorer: Scorer,
    training: Training,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    optimizer: MakeOptimizer | None = None,
    rows: Sequence[Encoded] | None = None,
) -> FitReport:
    """Trains a PEFT model in place: `fit_adapter` for a model that has its adapter already.

    Args:
        model: the PEFT model.
        scorer: as in `fit_adapter`, and so are training, callbacks and optimizer.
        rows: encoded rows instead of the task's training rows; one with a "target", probabilities
            (C,), is trained towards these instead of its answer.

    Returns:
        What the training took.

    Raises:
        Refusal, NotFiniteError, Interrupted: as `fit_adapter`.
    """
    check_launched(callbacks, optimizer, bf16=training.bf16)
    meter = Meter()
    if rows is None:
        check_trainable(scorer.task)
        rows = scorer.encode(scorer.task.train)
    kind = LengthGroupedTrainer if training.group_by_length else ClassTrainer
    steps = training.total_steps(len(rows))
    with tempfile.TemporaryDirectory() as scratch, StopOnSignal() as stop:
        folder = training.output or Path(scratch)
        trainer = kind(
            model,
            scorer,
            args=_arguments(training, folder, steps),
            train_dataset=list(rows),
            callbacks=[*callbacks, stop, KnownBase(model), ReadableCheckpoints()],
            optimizers=(optimizer(model) if optimizer else None, None),
        )
        if not training.progress:  # instead of printing to standard output, which is for results
            trainer.pop_callback(PrinterCallback)
            trainer.add_callback(LogLines)
        if not training.resume:
            start_anew(folder)
        checkpoint = to_go_on_from(folder, callbacks, steps) if training.resume else None
        if checkpoint is not None:
            check_base(checkpoint, model)
        with eager_attention(model, _eagerly(model, scorer, rows, bf16=training.bf16)):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    stop.raise_if_stopped(state.global_step)
    report = FitReport(steps=state.global_step, history=list(state.log_history))
    return report.plus(**meter.read())


def _eagerly(model: nn.Module, scorer: Scorer, rows: Sequence[Encoded], *, bf16: bool) -> bool:
    """Whether plain attention trains faster on these rows."""
    if isinstance(scorer, TextScorer) and scorer.layout == "packed":
        return False  # the mask of packed rows fits the model's own attention only
    longest = max(row.get("length", math.inf) for row in rows)
    return trains_faster_eagerly(model, longest, bf16=bf16)


# transformers has renamed gradient_checkpointing
_CHECKPOINTING = "gradient_checkpointing"
if "activation_checkpointing" in {field.name for field in fields(TrainingArguments)}:
    _CHECKPOINTING = "activation_checkpointing"


def _rows_of_a_process(training: Training) -> int:
    """The rows of a forward pass in one process: a part of the batch, whatever their number."""
    rows, rest = divmod(training.batch_size, num_processes())
    if rest:
        raise Refusal(
            f"a batch does not divide among the processes: got batch_size {training.batch_size}, "
            f"expected a multiple of {num_processes()}; change it, or the number of processes"
        )
    return rows


def _on_one_device(arguments: TrainingArguments) -> TrainingArguments:
    """Limits a Trainer in one process to one GPU: it would give each one a batch (DataParallel)."""
    if arguments.n_gpu > 1:
        logger.warning(
            "%d GPUs are there and one is used; start the command with accelerate launch to use "
            "them all",
            arguments.n_gpu,
        )
        arguments._n_gpu = 1
    return arguments


def _arguments(training: Training, folder: Path, steps: int) -> TrainingArguments:
    renamed: dict[str, Any] = {_CHECKPOINTING: training.gradient_checkpointing}
    arguments = TrainingArguments(
        output_dir=os.fspath(folder),
        max_steps=steps,
        per_device_train_batch_size=_rows_of_a_process(training),
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
        **renamed,
        save_strategy="steps" if training.save_steps else "no",
        save_steps=training.save_steps or steps,
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,  # it would wait for the device; FiniteLoss does not
        disable_tqdm=not training.progress,
        report_to=[],
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    return _on_one_device(arguments)


def adamw(training: Training, names: Collection[str], learning_rate: float) -> MakeOptimizer:
    """AdamW as `training` says, vectors not decayed; some parameters have their own learning rate.

    Args:
        training: gives the learning rate and the weight decay of all others.
        names: last parts of the names of parameters with `learning_rate` and no decay.
        learning_rate: of these parameters.

    Returns:
        A function that makes the optimiser of a PEFT model, for `fit_adapter`.
    """

    def make(model: nn.Module) -> torch.optim.Optimizer:
        matrices: dict[str, Any] = {"params": [], "weight_decay": training.weight_decay}
        vectors: dict[str, Any] = {"params": []}
        named: dict[str, Any] = {"params": [], "lr": learning_rate}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name.rpartition(".")[2] in names:
                named["params"].append(parameter)
            elif parameter.dim() > 1:
                matrices["params"].append(parameter)
            else:
                vectors["params"].append(parameter)
        groups = [group for group in (matrices, vectors, named) if group["params"]]
        return torch.optim.AdamW(groups, lr=training.learning_rate, eps=1e-6, weight_decay=0.0)

    return make
