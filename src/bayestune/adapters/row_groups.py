"""How many sequences of a batch make one row, so that they share their draw in training."""

from typing import Any

from torch import nn

from bayestune.errors import Refusal


class RowGroups:
    """How many consecutive sequences of the batch make one row; shared by a model's random layers.

    The options of a question that are scored as separate sequences are one row and must see the
    same draw. A size is asked for before a pass and holds from its beginning to the next pass's, so
    that a checkpoint's recomputation, which comes after the pass, still finds it.
    """

    def __init__(self, size: int = 1) -> None:
        self.size = size
        self._next = 1

    def ask(self, size: int) -> None:
        """Sets the size of the next pass of the model."""
        self._next = size

    def begin(self, model: nn.Module, _: Any) -> None:
        """A forward pre-hook: takes the size that was asked for, one sequence a row if none was."""
        if model.training:
            self.size = self._next
            self._next = 1

    def rows(self, sequences: int) -> int:
        """How many rows a batch of so many sequences has; refuses a part of a row."""
        count, rest = divmod(sequences, self.size)
        if rest:
            raise Refusal(
                f"the batch does not divide into rows: got {sequences} sequences, expected a "
                f"multiple of {self.size} (sequences a row); call group_rows with the batch's size"
            )
        return count


def _found(model: nn.Module) -> RowGroups | None:
    for module in model.modules():
        if isinstance(groups := getattr(module, "groups", None), RowGroups):
            return groups
    return None


def row_groups_of(model: nn.Module) -> RowGroups:
    """The model's row groups, one for all its adapters; made and hooked to its passes if needed."""
    groups = _found(model)
    if groups is None:
        groups = RowGroups()
        model.register_forward_pre_hook(groups.begin)
    return groups


def group_rows(model: nn.Module, size: int) -> None:
    """Makes `size` consecutive sequences one row, with one draw, in the next training pass."""
    groups = _found(model) if model.training else None  # the mean and held draws do not ask
    if groups is not None:
        groups.ask(size)
