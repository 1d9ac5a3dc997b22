"""The checkpoints of a run in its folder: which to go on from, and which are another run's."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from bayestune.runtime import is_first_process

_STATE = "trainer_state.json"  # which the Trainer writes last
_EARLIER = "earlier_trainer_state.json"


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
