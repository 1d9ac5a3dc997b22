"""Computes once what no draw changes: blocks before the first drawn one, or all but the head."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bayestune.adapters import Arrivals, Slots, base_of, output_head, split_name
from bayestune.forward.draws import Chunk, repeated

Arguments = tuple[Any, dict[str, Any]]


@dataclass(frozen=True)
class BeforeFirstDraw:
    """Runs one copy of the rows through what no draw changes, and S copies through the rest.

    All S copies go into the model, and everything but the blocks before the first drawn one sees
    them: masks, positions, and what a classifier reads of its inputs at its end. Where the output
    head alone is drawn, one copy goes into the model.

    Args:
        slots: where the draws stand.
        before: the blocks before the first drawn one.
        drawn: the other blocks, or the output head; empty if nothing can be shared.
        only_head: whether the output head alone is drawn.
    """

    slots: Slots
    before: Sequence[nn.Module] = ()
    drawn: Sequence[nn.Module] = ()
    only_head: bool = False

    @classmethod
    def of(cls, slots: Slots, stacks: Mapping[str, Tensor]) -> Self:
        """Finds what comes before the slots that are drawn."""
        head = output_head(slots.model)
        layers = [slots.layers[split_name(name)[0]] for name in stacks]
        inner = [layer for layer in layers if layer is not head]
        if head is not None and not inner:
            return cls(slots, (), [head], only_head=True)
        blocks = _blocks_with(base_of(slots.model), inner[0])
        not_found = {*inner}
        drawn_blocks = []
        for number, block in enumerate(blocks):
            in_block = not_found.intersection(block.modules())
            not_found -= in_block
            if in_block:
                drawn_blocks.append(number)
        if not_found:
            return cls(slots)  # they are in other blocks, or in none
        first = drawn_blocks[0]
        if first < 1:
            return cls(slots)  # only the embedding comes before the first block
        return cls(slots, blocks[:first], blocks[first:])

    @property
    def way(self) -> str:
        """What the last pass shared."""
        return "once"

    @contextmanager
    def computing(self, chunk: Chunk, arrivals: Arrivals) -> Iterator[nn.Module]:
        """A context for a pass over as many copies of the rows as the chunk has draws."""
        with self.slots.holding(chunk.stacks, arrivals), ExitStack() as hooks:
            if chunk.size > 1 and arrivals.rows:
                self._hook(chunk.size, arrivals.rows, hooks)
            yield self.slots.model

    def _hook(self, times: int, rows: int, hooks: ExitStack) -> None:
        """Has one copy go through `before`, and all through `drawn`.

        Args:
            times: S.
            rows: S·N.
            hooks: what takes the hooks off in the end.
        """
        axes = 1 if self.only_head else 2  # in blocks, a single axis is not the rows

        def keep_first_copy(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Arguments:
            cut = {name: _first_copy(value, times, rows, axes) for name, value in kwargs.items()}
            return tuple(_first_copy(value, times, rows, axes) for value in args), cut

        def repeat_copies(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Arguments:
            whole = {name: _copies(value, times, rows) for name, value in kwargs.items()}
            return tuple(_copies(value, times, rows) for value in args), whole

        for module in [self.slots.model] if self.only_head else self.before:
            hooks.enter_context(_change_inputs(module, keep_first_copy))
        for module in self.drawn:
            hooks.enter_context(_change_inputs(module, repeat_copies))


def _change_inputs(module: nn.Module, change: Any) -> RemovableHandle:
    """Changes what a module is given, before other hooks run, so that they see what it sees."""
    return module.register_forward_pre_hook(change, prepend=True, with_kwargs=True)


def _first_copy(value: Any, times: int, rows: int, axes: int) -> Any:
    """The first of S copies, of tensors whose leading axis is S·N or a multiple; others stay.

    Args:
        value: a tensor, a tuple of them, or anything else.
        times: S.
        rows: S·N.
        axes: tensors with fewer stay.
    """
    if isinstance(value, tuple):
        return tuple(_first_copy(part, times, rows, axes) for part in value)
    if not isinstance(value, Tensor) or value.dim() < axes:
        return value
    return value if not len(value) or len(value) % rows else value[: len(value) // times]


def _copies(value: Any, times: int, rows: int) -> Any:
    """Repeats tensors of N rows S times; what has S·N rows, one for all, or none, stays."""
    if isinstance(value, tuple):
        return tuple(_copies(part, times, rows) for part in value)
    if not isinstance(value, Tensor) or value.dim() < 2 or len(value) * times != rows:
        return value
    return repeated(value, times)


def _blocks_with(model: nn.Module, layer: nn.Module) -> Sequence[nn.Module]:
    """The outermost list of modules (blocks) that a layer is in; empty where it is in none."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and any(layer is part for part in module.modules()):
            return list(module)
    return ()
