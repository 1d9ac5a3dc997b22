"""What a Trainer's batches say of rows, for the time of its run."""

from typing import Any

from torch import nn

from bayestune.adapters import RowGroups, found_passes

# TRL's collators of batches [chosen; rejected]
_OF_PAIRS = ("DataCollatorForPreference", "DataCollatorForVisionPreference")


def chosen_then_rejected(sequences: int) -> list[int]:
    """The row of each sequence of [chosen; rejected]: both sides of a pair are one."""
    pairs = (sequences + 1) // 2
    return [sequence % pairs for sequence in range(sequences)]


def begin_run(model: nn.Module, dataloader: Any) -> None:
    """Tells the model's passes that a Trainer's run begins and how its batches make rows."""
    passes = found_passes(model)
    if passes is not None:
        passes.begin_run(RowGroups(row_of=chosen_then_rejected) if _has_pairs(dataloader) else None)


def end_run(model: nn.Module) -> None:
    """Tells the model's passes that the run has ended."""
    passes = found_passes(model)
    if passes is not None:
        passes.end_run()


def _has_pairs(dataloader: Any) -> bool:
    collator = getattr(dataloader, "collate_fn", None)
    collator = getattr(collator, "data_collator", collator)  # a Trainer may wrap it
    return any(kind.__name__ in _OF_PAIRS for kind in type(collator).__mro__)
