"""What no draw changes is computed once: the blocks before the first drawn one, or all before the head."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bayestune.adapters import adapted_layers, base_of


@dataclass(frozen=True)
class BeforeFirstDraw:
    """What is computed on one copy of the rows: all before `head`, or all before the first of `blocks`."""

    head: nn.Module | None = None
    blocks: tuple[nn.Module, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, stacks: Mapping[str, Tensor], adapter: str) -> "BeforeFirstDraw":
        """By the slots that are drawn."""
        layers = adapted_layers(model, adapter)
        paths = {name.rpartition(".")[0] for name in stacks}
        inner: Any = base_of(model)
        head = inner.get_output_embeddings()
        if {layers[path] for path in paths} == {head}:
            return cls(head=head)
        places = [_place(inner, path) for path in paths if layers[path] is not head]
        stacks_of_blocks = {id(place[0]): place[0] for place in places if place}
        if None in places or len(stacks_of_blocks) != 1:
            return cls()
        (blocks,), first = stacks_of_blocks.values(), min(place[1] for place in places if place)
        return (
            cls(blocks=tuple(blocks[first:])) if first else cls()
        )  # before the first block is only the embedding

    def __bool__(self) -> bool:
        return self.head is not None or bool(self.blocks)

    def computing(self, model: nn.Module, times: int) -> AbstractContextManager[None]:
        """For the time of a pass over `times` copies of the rows."""
        if times == 1:
            return nullcontext()
        return self._hooked(model, times)

    @contextmanager
    def _hooked(self, model: nn.Module, times: int) -> Iterator[None]:
        def first_copy(
            _: nn.Module, args: Any, kwargs: dict[str, Any]
        ) -> tuple[Any, dict[str, Any]]:
            return tuple(_cut(v, times) for v in args), {
                name: _cut(v, times) for name, v in kwargs.items()
            }

        def every_copy(
            module: nn.Module, args: Any, kwargs: dict[str, Any]
        ) -> tuple[Any, dict[str, Any]]:
            hidden, *others = args
            enters = module is self.head or module is self.blocks[0]
            num_rows = len(hidden) if enters else len(hidden) // times
            hidden = _copies(hidden, times, num_rows) if enters else hidden
            others = [_copies(value, times, num_rows) for value in others]
            return (hidden, *others), {
                name: _copies(value, times, num_rows) for name, value in kwargs.items()
            }

        later = [self.head] if self.head else self.blocks
        hooks = [model.register_forward_pre_hook(first_copy, with_kwargs=True)]
        hooks += [
            module.register_forward_pre_hook(every_copy, with_kwargs=True)
            for module in later
            if module
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _cut(value: Any, times: int) -> Any:
    return value[: len(value) // times] if isinstance(value, Tensor) and value.dim() else value


def _copies(value: Any, times: int, num_rows: int) -> Any:
    """Tensors of `num_rows` rows `times` over; what is broadcast over rows, or belongs to none, as it is."""
    if isinstance(value, tuple):
        return tuple(_copies(part, times, num_rows) for part in value)
    if not isinstance(value, Tensor) or value.dim() < 2 or len(value) != num_rows:
        return value
    return repeated(value, times)


def _place(model: nn.Module, path: str) -> tuple[nn.ModuleList, int] | None:
    """The stack of blocks that a layer is in, and in which of them; None where it is in none."""
    names = path.split(".")
    for i, name in enumerate(names):
        parent = model.get_submodule(".".join(names[:i]))
        if isinstance(parent, nn.ModuleList) and name.isdigit():
            return parent, int(name)
    return None


def repeated(value: Tensor, times: int) -> Tensor:
    return value.repeat(times, *[1] * (value.dim() - 1))
