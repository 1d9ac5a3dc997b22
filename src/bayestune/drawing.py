"""Held draws of adapters → their logits (S, N, C) in as few passes as memory allows, shared work done once."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bayestune.common import CommonPrefix
from bayestune.lora import adapted_layers, base_of, drawn, evaluating
from bayestune.posterior import Batch, Drawable, Draws, mean_logits, on_device
from bayestune.prefix import SharedPrefix
from bayestune.snapshot import Snapshot

Stacks = dict[str, Tensor]


@dataclass
class Held:
    """Held draws, kept until the adapter or the seed changes, and what they have read of the rows' beginning."""

    seed: int = 0
    snapshot: Snapshot | None = None
    draws: dict[int, Stacks] = field(default_factory=dict)
    last: tuple[range, Stacks] = (range(0), {})
    common: CommonPrefix = field(default_factory=CommonPrefix)

    def of(self, posterior: Drawable, draws: Draws) -> Stacks:
        """The draws as one stack (S, …) for each slot name."""
        same = self.snapshot is not None and self.snapshot.still_of(posterior.model)
        if self.snapshot is None or not same or self.seed != draws.seed:
            self.snapshot = Snapshot(posterior.model)
            self.seed, self.draws, self.last = draws.seed, {}, (range(0), {})
        if self.last[0] != draws.indices:
            for index in draws.indices:
                if index not in self.draws:
                    self.draws[index] = posterior.draw(index, draws.seed)
            chosen = [self.draws[index] for index in draws.indices]
            self.last = draws.indices, {name: torch.stack([draw[name] for draw in chosen]) for name in chosen[0]}
        return self.last[1]


def drawn_logits(posterior: Drawable, inputs: Batch, draws: Draws, held: Held) -> Tensor:
    """The draws' logits (S, N, C), S·N rows in one pass within the bounds of `draws`; (1, N, C) for the mean.

    What no draw changes is computed once: all blocks before the first one with a drawn slot, or everything before the
    output head where its adapter alone is drawn. Otherwise the tokens that all rows begin with are read once for each
    draw, see `common.CommonPrefix`.

    Raises:
        ValueError: if a shared prefix is asked for and the posterior has no mean or the model cannot share one.
    """
    model, adapter = posterior.model, posterior.adapter
    if draws.count == 0:
        return mean_logits(posterior, inputs)
    stacks, inputs = held.of(posterior, draws), on_device(inputs, model)
    once, prefix = _Once.of(model, stacks, adapter), _prefix(posterior, draws)
    step = draws.count if once.head else draws.at_once(inputs)
    chunks, common = [], held.common.under(model, draws.count, stacks)
    with evaluating(model):
        for start in range(0, draws.count, step):
            part = {name: weights[start : start + step] for name, weights in stacks.items()}
            size = min(step, draws.count - start)
            sharing = once.computing(model, size) if once else common.sharing(model, start, size)
            chunks.append(_pass(posterior, repeat_rows(inputs, size), part, size, sharing, prefix))
    return torch.cat(chunks)


def _pass(
    posterior: Drawable,
    inputs: Batch,
    part: Stacks,
    size: int,
    sharing: AbstractContextManager[None],
    prefix: SharedPrefix | None,
) -> Tensor:
    """The logits (size, N, C) of some of the draws, from one pass over their rows."""
    if prefix is not None:
        with prefix.drawing(part, size):
            logits = posterior.score(prefix, inputs)
    else:
        with drawn(posterior.model, part, posterior.adapter), sharing:
            logits = posterior.score(posterior.model, inputs)
    return logits.unflatten(0, (size, -1))


def _prefix(posterior: Drawable, draws: Draws) -> SharedPrefix | None:
    if draws.shared_prefix is None:
        return None
    if not posterior.has_mean:
        raise ValueError(
            f"draws cannot share a prefix: got a {type(posterior).__name__} without a mean adapter to read it with; "
            "leave shared_prefix out"
        )
    return SharedPrefix(posterior.model, draws.shared_prefix, posterior.adapter)


@dataclass(frozen=True)
class _Once:
    """What is computed on one copy of the rows: all before `head`, or all before the first of `blocks`."""

    head: nn.Module | None = None
    blocks: tuple[nn.Module, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, stacks: Mapping[str, Tensor], adapter: str) -> "_Once":
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
        return cls(blocks=tuple(blocks[first:])) if first else cls()  # before the first block is only the embedding

    def __bool__(self) -> bool:
        return self.head is not None or bool(self.blocks)

    def computing(self, model: nn.Module, times: int) -> AbstractContextManager[None]:
        """For the time of a pass over `times` copies of the rows."""
        if times == 1:
            return nullcontext()
        return self._hooked(model, times)

    @contextmanager
    def _hooked(self, model: nn.Module, times: int) -> Iterator[None]:
        def first_copy(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return tuple(_cut(v, times) for v in args), {name: _cut(v, times) for name, v in kwargs.items()}

        def every_copy(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            hidden, *others = args
            enters = module is self.head or module is self.blocks[0]
            num_rows = len(hidden) if enters else len(hidden) // times
            hidden = _copies(hidden, times, num_rows) if enters else hidden
            others = [_copies(value, times, num_rows) for value in others]
            return (hidden, *others), {name: _copies(value, times, num_rows) for name, value in kwargs.items()}

        later = [self.head] if self.head else self.blocks
        hooks = [model.register_forward_pre_hook(first_copy, with_kwargs=True)]
        hooks += [module.register_forward_pre_hook(every_copy, with_kwargs=True) for module in later if module]
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
    return _repeated(value, times)


def _place(model: nn.Module, path: str) -> tuple[nn.ModuleList, int] | None:
    """The stack of blocks that a layer is in, and in which of them; None where it is in none."""
    names = path.split(".")
    for i, name in enumerate(names):
        parent = model.get_submodule(".".join(names[:i]))
        if isinstance(parent, nn.ModuleList) and name.isdigit():
            return parent, int(name)
    return None


def repeat_rows(inputs: Batch, times: int) -> dict[str, Tensor]:
    """The batch `times` over along the leading axis: (N, …) to (times·N, …), copy by copy."""
    return {name: _repeated(value, times) for name, value in inputs.items()}


def _repeated(value: Tensor, times: int) -> Tensor:
    return value.repeat(times, *[1] * (value.dim() - 1))
