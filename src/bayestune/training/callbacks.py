"""Stops training when the loss is NaN or infinite; writes a checkpoint at ctrl-C."""

import contextlib
import math
import signal
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Interrupted(KeyboardInterrupt):
    """Training was stopped by ctrl-C after a checkpoint was written."""


class NotFiniteError(FloatingPointError):
    """The loss became NaN or infinite; checkpoints from before are kept."""


class StopOnSignal(TrainerCallback):
    """The first ctrl-C ends the step, writes a checkpoint and stops; the second stops at once."""

    def __init__(self) -> None:
        self.stopped = False
        self._before: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Takes the signal over."""
        with contextlib.suppress(ValueError):  # not in the main thread: its owner handles signals
            self._before = signal.signal(signal.SIGINT, self._handle)

    def _handle(self, *_: Any) -> None:
        self.stopped = True
        self.on_train_end()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Saves and stops after ctrl-C."""
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Gives the signal back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


class FiniteLoss(TrainerCallback):
    """Stops training when the loss is NaN or infinite: at once on a CPU, else a step later.

    Reading a number from an accelerator waits for all that is queued. So the loss is copied without
    waiting, and checked when the next one arrives or before anything is saved or logged.
    """

    def __init__(self) -> None:
        self._loss: Tensor | None = None
        self._arrival: torch.Event | None = None
        self._where = ""

    def record(self, loss: Tensor, state: TrainerState, args: TrainingArguments) -> None:
        """Takes note of a step's loss, which an accelerator is still computing."""
        self.check()
        self._where = (
            f"step {state.global_step + 1} of {state.max_steps}; training stopped, checkpoints in "
            f"{args.output_dir} are from before"
        )
        self._loss = loss.detach().to("cpu", non_blocking=True)
        if loss.device.type == "cpu":
            self.check()
        else:
            self._arrival = torch.accelerator.current_stream(loss.device).record_event()

    def check(self) -> None:
        """Raises `NotFiniteError` if the loss that was recorded last is NaN or infinite."""
        if self._loss is None:
            return
        if self._arrival is not None:
            self._arrival.synchronize()
        value = float(self._loss)
        self._loss = None
        if not math.isfinite(value):
            raise NotFiniteError(
                f"the loss is {value} at {self._where}; lower the learning rate or use bf16"
            )

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Checks before a checkpoint or a log line is written, and at the end."""
        if control.should_save or control.should_log or state.global_step >= state.max_steps:
            self.check()


def add_to_log(state: TrainerState, logs: dict[str, float], values: Mapping[str, float]) -> None:
    """Adds values to the log line that is being written, for callbacks' `on_log`."""
    logs.update(values)
    state.log_history[-1].update(values)
