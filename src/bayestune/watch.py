"""Stops training when the loss is no number, without waiting for the device in every step."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class NotFiniteError(FloatingPointError):
    """The loss became NaN or infinite; checkpoints from before are kept."""


class LossWatch(TrainerCallback):
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
        self._arrival = None if on_cpu else torch.accelerator.current_stream(loss.device).record_event()
        self._where = f"step {state.global_step + 1} of {state.max_steps}; training stopped, checkpoints in "
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
            raise NotFiniteError(f"the loss is {value} at {self._where}; lower the learning rate or use bf16")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Looks before a checkpoint or a log line is written, and at the end."""
        if control.should_save or control.should_log or state.global_step >= state.max_steps:
            self.look()
