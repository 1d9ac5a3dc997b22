"""Fits an adapter by maximum likelihood on `transformers.Trainer`: the engine of every method that trains."""

import math
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from bayestune.attention import eager_attention, trains_faster_eagerly
from bayestune.lora import Lora, attach
from bayestune.order import ByLength
from bayestune.scoring import Scorer, TextScorer
from bayestune.tasks import check_trainable
from bayestune.watch import LossWatch

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
    group_by_length: bool = False
    save_steps: int | None = None
    logging_steps: int = 25
    output: Path | None = None
    resume: bool = False
    progress: bool = True

    def total_steps(self, num_rows: int) -> int:
        """Optimiser steps of a run over `num_rows` rows."""
        if self.epochs is None:
            return self.steps
        return math.ceil(self.epochs * math.ceil(math.ceil(num_rows / self.batch_size) / self.accumulation))


@dataclass(frozen=True)
class Fitted:
    """What a run of training reports: seconds, steps, the log and the peak memory in MB."""

    seconds: float
    steps: int
    history: list[dict[str, float]]
    peak_memory_mb: float


class Interrupted(KeyboardInterrupt):
    """Training was stopped by ctrl-C after a checkpoint was written."""


class _StopOnSignal(TrainerCallback):
    """The first ctrl-C ends the step, writes a checkpoint and stops; the second one stops at once."""

    def __init__(self) -> None:
        self.stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = signal.getsignal(signal.SIGINT)
        try:
            signal.signal(signal.SIGINT, self._handle)
        except ValueError:  # not in the main thread: its owner handles signals
            self._before = None

    def _handle(self, *_: Any) -> None:
        self.stopped = True
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore()


def _unused(*_: Any, **__: Any) -> Tensor:  # given to the Trainer so that it counts the rows of an optimiser step
    raise AssertionError("compute_loss is overridden")


class ClassTrainer(Trainer):
    """A Trainer whose loss is the mean over rows of −log p(answer), exact under gradient accumulation."""

    def __init__(self, model: nn.Module, scorer: Scorer, *, group_by_length: bool = False, **kwargs: Any) -> None:
        super().__init__(model=model, data_collator=self._collate, compute_loss_func=_unused, **kwargs)  # type: ignore[arg-type]
        self.scorer, self.group_by_length, self.watch = scorer, group_by_length, LossWatch()
        self.add_callback(self.watch)

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's own, or one whose batches hold rows of like length.

        The Trainer's sampler for that wants `input_ids` in each row, and draws its order from the global generator,
        which a resumed run finds in another state: it would go on with other rows.
        """
        if not self.group_by_length:
            return super().get_train_dataloader()
        rows: Any = self.train_dataset
        size, lengths = self.args.train_batch_size, [row["length"] for row in rows]
        sampler = ByLength(lengths, size, self.args.seed, lambda: int(self.state.epoch or 0))
        pin = self.args.dataloader_pin_memory
        return self.accelerator.prepare(
            DataLoader(rows, size, sampler=sampler, collate_fn=self._collate, pin_memory=pin)
        )

    def _collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.scorer.collate(rows)
        # The Trainer counts `labels[:, 1:]` for causal models unless it is told what to count.
        return {**batch, "shift_labels": batch["labels"]}

    def compute_loss(  # noqa: D102
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"]
        logits = self.scorer(model, inputs)
        loss = F.cross_entropy(logits, labels, reduction="sum") / (num_items_in_batch or len(labels))
        self.watch.see(loss, self.state, self.args)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, {"logits": logits}) if return_outputs else loss


def start_adapter(model: nn.Module, training: Training) -> nn.Module:
    """The PEFT model with a fresh adapter, the same for the same seed."""
    set_seed(training.seed)
    return attach(model, training.lora)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; one that a kill cut short is passed over."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def train(
    model: nn.Module,
    scorer: Scorer,
    training: Training,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    optimizer: Optimizer | None = None,
) -> Fitted:
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
    check_trainable(scorer.task)
    rows = scorer.encode(scorer.task.train)
    stop = _StopOnSignal()
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
    return Fitted(seconds, trainer.state.global_step, list(trainer.state.log_history), peak_memory_mb())


def _eagerly(model: nn.Module, scorer: Scorer, rows: Sequence[dict[str, Any]], training: Training) -> bool:
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


def peak_memory_mb() -> float:
    """Peak memory of the process so far in MB: the accelerator's where there is one, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
