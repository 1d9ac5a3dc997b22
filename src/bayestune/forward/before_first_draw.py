"""Computes once what no draw changes: blocks before the first drawn one, or all but the head."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from bayestune.adapters import Slots, base_of, output_head, split_name
from bayestune.forward.draws import repeated
from bayestune.forward.sharing import Chunk

Arguments = tuple[Any, dict[str, Any]]


@dataclass(frozen=True)
class BeforeFirstDraw:
    """Runs one copy of the rows through what no draw changes, and S copies through the rest.

    Args:
        slots: where the draws stand.
        head: the output head, if it alone is drawn.
        blocks: otherwise the blocks from the first drawn one on; empty where nothing comes before
            it.
    """

    slots: Slots
    head: nn.Module | None = None
    blocks: tuple[nn.Module, ...] = ()

    @classmethod
    def of(cls, slots: Slots, stacks: Mapping[str, Tensor]) -> Self:
        """Finds what comes before the slots that are drawn."""
        base = base_of(slots.model)
        head = output_head(slots.model)
        paths = {split_name(name)[0] for name in stacks}
        drawn = {path: slots.layers[path] for path in paths}
        if head is not None and all(layer is head for layer in drawn.values()):
            return cls(slots, head=head)
        inner = [path for path, layer in drawn.items() if layer is not head]
        places = [_block_of(base, path) for path in inner]
        lists = {id(place[0]) for place in places if place}
        if None in places or len(lists) != 1:
            return cls(slots)
        found = [place for place in places if place]
        first = min(index for _, index in found)
        if first == 0:  # before the first block is only the embedding
            return cls(slots)
        return cls(slots, blocks=tuple(found[0][0][first:]))

    def __bool__(self) -> bool:
        return self.head is not None or bool(self.blocks)

    @contextmanager
    def computing(self, chunk: Chunk) -> Iterator[nn.Module]:
        """For the time of a pass over as many copies of the rows as the chunk has draws."""
        with self.slots.holding(chunk.stacks):
            if chunk.size == 1:
                yield self.slots.model
                return
            hooks = self._hooks(chunk.size)
            try:
                yield self.slots.model
            finally:
                for hook in hooks:
                    hook.remove()

    def _hooks(self, times: int) -> list[Any]:
        first = self.head if self.head is not None else self.blocks[0]
        later = [first, *self.blocks[1:]]

        def keep_first_copy(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Arguments:
            cut = {name: _first_copy(value, times) for name, value in kwargs.items()}
            return tuple(_first_copy(value, times) for value in args), cut

        def repeat_copies(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Arguments:
            hidden, *others = args
            rows = len(hidden) if module is first else len(hidden) // times
            if module is first:
                hidden = _copies(hidden, times, rows)
            whole = {name: _copies(value, times, rows) for name, value in kwargs.items()}
            return (hidden, *(_copies(value, times, rows) for value in others)), whole

        hooks = [self.slots.model.register_forward_pre_hook(keep_first_copy, with_kwargs=True)]
        for module in later:
            hooks.append(module.register_forward_pre_hook(repeat_copies, with_kwargs=True))
        return hooks


def _first_copy(value: Any, times: int) -> Any:
    return value[: len(value) // times] if isinstance(value, Tensor) and value.dim() else value


def _copies(value: Any, times: int, num_rows: int) -> Any:
    """Repeats tensors of `num_rows` rows; what is broadcast over rows, or is of none, stays."""
    if isinstance(value, tuple):
        return tuple(_copies(part, times, num_rows) for part in value)
    if not isinstance(value, Tensor) or value.dim() < 2 or len(value) != num_rows:
        return value
    return repeated(value, times)


def _block_of(model: nn.Module, path: str) -> tuple[nn.ModuleList, int] | None:
    """The list of blocks that a layer is in, and in which of them; None where it is in none."""
    names = path.split(".")
    for i, name in enumerate(names):
        parent = model.get_submodule(".".join(names[:i]))
        if isinstance(parent, nn.ModuleList) and name.isdigit():
            return parent, int(name)
    return None
