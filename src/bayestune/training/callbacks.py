"""Stops training when the loss is NaN or infinite, and writes a checkpoint at ctrl-C."""

import math
import signal
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Interrupted(KeyboardInterrupt):
    """Training was stopped by ctrl-C after a checkpoint was written."""


class StopOnSignal(TrainerCallback):
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

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore()


class NotFiniteError(FloatingPointError):
    """The loss became NaN or infinite; checkpoints from before are kept."""


class FiniteLoss(TrainerCallback):
    """Looks at each step's loss: at once on a CPU, a step later on an accelerator.

    Asking an accelerator for a number waits until all that was queued before is done, and meanwhile nothing new is
    queued. Here the number is sent on its way, and looked at when the next step's is, or before anything is saved or
    logged.
    """

    def __init__(self) -> None:
        self._sent: Tensor | None = None
        self._arrival: torch.Event | None = None
        self._where = ""

    def see(self, loss: Tensor, state: TrainerState, args: TrainingArguments) -> None:
        """Takes note of a step's loss, which is still being computed on an accelerator.

        Raises:
            NotFiniteError: if this loss, or on an accelerator the one before, is NaN or infinite.
        """
        self.look()
        on_cpu = loss.device.type == "cpu"
        self._sent = loss.detach().to("cpu", non_blocking=not on_cpu)
        self._arrival = (
            None if on_cpu else torch.accelerator.current_stream(loss.device).record_event()
        )
        self._where = (
            f"step {state.global_step + 1} of {state.max_steps}; training stopped, checkpoints in "
        )
        self._where += f"{args.output_dir} are from before"
        if on_cpu:
            self.look()

    def look(self) -> None:
        """Looks at the loss that was seen last.

        Raises:
            NotFiniteError: if it is NaN or infinite.
        """
        if self._sent is None:
            return
        if self._arrival is not None:
            self._arrival.synchronize()
        value, self._sent = float(self._sent), None
        if not math.isfinite(value):
            raise NotFiniteError(
                f"the loss is {value} at {self._where}; lower the learning rate or use bf16"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks before a checkpoint or a log line is written, and at the end."""
        if control.should_save or control.should_log or state.global_step >= state.max_steps:
            self.look()
