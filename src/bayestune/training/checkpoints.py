"""The checkpoints of a run in its folder: which to go on from, and which are another run's."""

import json
import math
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from bayestune.adapters import differs_frozen, frozen_samples
from bayestune.errors import Refusal
from bayestune.runtime import in_first_process, is_first_process, of_first_process
from bayestune.whole_files import write_text_whole

_STATE = "trainer_state.json"  # which the Trainer writes last
_EARLIER = "earlier_trainer_state.json"
_BASE = "base_samples.json"


class KnownBase(TrainerCallback):
    """Notes in each checkpoint which base the adapter is trained on.

    Args:
        model: the PEFT model; where it is spread over processes, all of them must call this.
    """

    def __init__(self, model: nn.Module) -> None:
        self.samples = frozen_samples(model)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes samples of the base to the checkpoint that was written."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            write_text_whole(folder / _BASE, json.dumps(self.samples) + "\n")


def check_base(checkpoint: Path, model: nn.Module) -> None:
    """Refuses to go on from a checkpoint on another base than it was trained on.

    Args:
        checkpoint: its folder; those of earlier versions do not tell.
        model: the PEFT model.

    Raises:
        Refusal: if samples of the base's weights, or its settings, are others.
    """
    saved = of_first_process(_samples_in(checkpoint))
    differing = differs_frozen(saved, model) if saved else []
    in_first_process(partial(_refuse_other_base, checkpoint, differing))  # others may lack weights


def _samples_in(checkpoint: Path) -> dict[str, Any] | None:
    file = checkpoint / _BASE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _refuse_other_base(checkpoint: Path, differing: Sequence[str]) -> None:
    if differing:
        raise Refusal(
            f"resume=True goes on from {checkpoint}: got a base model with another "
            f"{differing[0]} ({len(differing)} of the samples differ), expected the one that it "
            "was trained on; load that (after set_seed, if a part of it starts from random "
            "numbers), or leave resume out"
        )


def to_go_on_from(folder: Path, callbacks: Sequence[Any], steps: int) -> Path | None:
    """The newest checkpoint before the last step that has the files of all callbacks.

    A checkpoint of the last step does not serve: from there the Trainer would take one step too
    many. If no checkpoint has the callbacks' files, the newest one is returned, which the callback
    then refuses.

    Args:
        folder: of the run.
        callbacks: of the run; `kept_file` of one is the name of its file in each checkpoint.
        steps: of the whole run.
    """
    kept = [callback.kept_file for callback in callbacks if hasattr(callback, "kept_file")]
    complete = newest_checkpoint(folder, steps, kept)
    return newest_checkpoint(folder, steps) if complete is None else complete


def newest_checkpoint(
    folder: Path, before: float = math.inf, kept: Collection[str] = ()
) -> Path | None:
    """The newest checkpoint that was written to its end, or None.

    Skipped are checkpoints that a kill cut short, and those that were in the folder when the run
    was started anew, see `start_anew`.

    Args:
        folder: of the run.
        before: the step of the checkpoint must be smaller.
        kept: names of files, of callbacks, that the checkpoint must have.
    """
    by_step: dict[int, Path] = {}
    for state in folder.glob(f"checkpoint-*/{_STATE}"):
        step = int(state.parent.name.rpartition("-")[2])
        if step < before and all((state.parent / name).is_file() for name in kept):
            by_step[step] = state.parent
    return by_step[max(by_step)] if by_step else None


def start_anew(folder: Path) -> None:
    """Has a run start anew in a folder with checkpoints of an earlier one: these are ignored.

    Their state file, which the Trainer writes last, is renamed.

    Args:
        folder: of the run.
    """
    if is_first_process():
        for state in folder.glob(f"checkpoint-*/{_STATE}"):
            state.replace(state.with_name(_EARLIER))
