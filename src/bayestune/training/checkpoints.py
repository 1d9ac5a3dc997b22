"""The checkpoints of a run in its folder: which to go on from, and which are another run's."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from bayestune.runtime import is_first_process

_STATE = "trainer_state.json"  # which the Trainer writes last
_EARLIER = "earlier_trainer_state.json"


def to_go_on_from(folder: Path, callbacks: Sequence[Any], steps: int) -> Path | None:
    """The newest checkpoint before the last step that has what the callbacks keep in it.

    From one of the last step the Trainer would take a step more: the last ones are taken again. One
    without what a callback keeps is for the callback to refuse, if there is no other.
    """
    kept = [callback.kept_file for callback in callbacks if hasattr(callback, "kept_file")]
    whole = newest_checkpoint(folder, steps, kept)
    return newest_checkpoint(folder, steps) if whole is None else whole


def newest_checkpoint(
    folder: Path, before: float = math.inf, kept: Collection[str] = ()
) -> Path | None:
    """The newest checkpoint that was written to its end; one that a kill cut short is skipped.

    So are those that stood there when the run was started anew, see `start_anew`.

    Args:
        folder: of the run.
        before: the step that it must stand before.
        kept: files that it must have, of callbacks.
    """
    found: dict[int, Path] = {}
    for state in folder.glob(f"checkpoint-*/{_STATE}"):
        step = int(state.parent.name.rpartition("-")[2])
        if step < before and all((state.parent / name).is_file() for name in kept):
            found[step] = state.parent
    return found[max(found)] if found else None


def start_anew(folder: Path) -> None:
    """Puts the checkpoints of an earlier run in a folder aside: this one does not go on with them.

    Their state, which is written last, gets another name.
    """
    if is_first_process():
        for state in folder.glob(f"checkpoint-*/{_STATE}"):
            state.replace(state.with_name(_EARLIER))
