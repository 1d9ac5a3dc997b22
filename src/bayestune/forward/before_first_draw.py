"""Computes once what no draw changes: blocks before the first drawn one, or all but the head."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from bayestune.adapters import Slots, base_of, output_head, split_name
from bayestune.forward.draws import Chunk, repeated

Arguments = tuple[Any, dict[str, Any]]


@dataclass(frozen=True)
class BeforeFirstDraw:
    """Runs one copy of the rows through what no draw changes, and S copies through the rest.

    `drawn`: the blocks from the first drawn one on; the output head if it alone is drawn; or none.
    """

    slots: Slots
    drawn: Sequence[nn.Module] = ()
    only_head: bool = False

    @classmethod
    def of(cls, slots: Slots, stacks: Mapping[str, Tensor]) -> Self:
        """Finds what comes before the slots that are drawn."""
        base = base_of(slots.model)
        head = output_head(slots.model)
        paths = {split_name(name)[0] for name in stacks}
        inner = [path for path in paths if slots.layers[path] is not head]
        if head is not None and not inner:
            return cls(slots, [head], only_head=True)
        places = [_block_of(base, path) for path in inner]
        blocks = places[0][0]
        first = min(index for _, index in places)
        if first < 1 or any(others is not blocks for others, _ in places):
            return cls(slots)  # before the first block is only the embedding
        return cls(slots, blocks[first:])

    @contextmanager
    def computing(self, chunk: Chunk) -> Iterator[nn.Module]:
        """For the time of a pass over as many copies of the rows as the chunk has draws."""
        with self.slots.holding(chunk.stacks), ExitStack() as hooks:
            if chunk.size > 1:
                self._hook(chunk.size, hooks)
            yield self.slots.model

    def _hook(self, times: int, hooks: ExitStack) -> None:
        def keep_first_copy(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Arguments:
            cut = {name: _first_copy(value, times) for name, value in kwargs.items()}
            return tuple(_first_copy(value, times) for value in args), cut

        def repeat_copies(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Arguments:
            rows = len(args[0]) // (1 if module is self.drawn[0] else times)
            whole = {name: _copies(value, times, rows) for name, value in kwargs.items()}
            return tuple(_copies(value, times, rows) for value in args), whole

        model = self.slots.model
        hooks.enter_context(model.register_forward_pre_hook(keep_first_copy, with_kwargs=True))
        for module in self.drawn:
            hooks.enter_context(module.register_forward_pre_hook(repeat_copies, with_kwargs=True))


def _first_copy(value: Any, times: int) -> Any:
    return value[: len(value) // times] if isinstance(value, Tensor) and value.dim() else value


def _copies(value: Any, times: int, num_rows: int) -> Any:
    """Repeats tensors of `num_rows` rows; what is broadcast over rows, or is of none, stays."""
    if isinstance(value, tuple):
        return tuple(_copies(part, times, num_rows) for part in value)
    if not isinstance(value, Tensor) or value.dim() < 2 or len(value) != num_rows:
        return value
    return repeated(value, times)


def _block_of(model: nn.Module, path: str) -> tuple[Any, int]:
    """The list of blocks that a layer is in, and in which of them; -1 where it is in none."""
    names = path.split(".")
    for i, name in enumerate(names):
        parent = model.get_submodule(".".join(names[:i]))
        if isinstance(parent, nn.ModuleList):
            return parent, int(name)
    return None, -1
