"""Stops training when the loss is NaN or infinite; writes a checkpoint at ctrl-C and SIGTERM."""

import contextlib
import logging
import math
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bayestune.runtime import follow_umask

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Training was stopped by ctrl-C after a checkpoint was written."""


class Terminated(KeyboardInterrupt):
    """SIGTERM ended the process, as schedulers do; in training after a checkpoint was written."""


class NotFiniteError(FloatingPointError):
    """The loss became NaN or infinite; checkpoints from before are kept."""


class StopOnSignal(TrainerCallback):
    """The first ctrl-C or SIGTERM ends the step, writes a checkpoint and stops; the second at once.

    It is a context manager, so that the earlier handlers return however training ends.
    """

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Replaces the handlers of both signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: its owner handles signals
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Restores the earlier handlers."""
        while self._before:
            number, handler = self._before.popitem()
            # None is a handler that was not set from Python
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, _: Any) -> None:
        self.stopped_by = number
        self.__exit__()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Saves and stops after a signal."""
        if self.stopped_by is not None:
            control.should_save = True
            control.should_training_stop = True

    def raise_if_stopped(self, step: int) -> None:
        """Raises what ends the run, if a signal has stopped training."""
        if self.stopped_by is not None:
            kind = Terminated if self.stopped_by == signal.SIGTERM else Interrupted
            raise kind(f"stopped at step {step}; go on with --resume")


class ReadableCheckpoints(TrainerCallback):
    """Lets others read checkpoints as far as the umask allows, because they are posteriors too."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets the file modes of the checkpoint that was written."""
        folder = Path(args.output_dir or ".", f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            follow_umask(folder)


class LogLines(TrainerCallback):
    """A line of the log every `logging_steps`, where no progress bar shows how far training is."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Logs the loss."""
        loss = (kwargs.get("logs") or {}).get("loss")
        if loss is not None:
            logger.info("step %d of %d: loss %.4g", state.global_step, state.max_steps, loss)


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
    """Adds values to the log line that is being written, in a callback's `on_log`.

    Args:
        state: of the Trainer, whose history has the line already.
        logs: the line, as `on_log` receives it.
        values: by name.
    """
    logs.update(values)
    state.log_history[-1].update(values)
