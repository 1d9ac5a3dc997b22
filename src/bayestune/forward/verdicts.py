"""Whether draws that share a pass are what each is alone: found once for a kind of batch."""

import logging
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bayestune.adapters import base_of
from bayestune.forward.draws import Batch, ClassLogits, device_of, main_input, repeat_rows

logger = logging.getLogger(__name__)

OF_SPREAD = 0.01  # of the draws' spread, which a difference may be
IN_FLOAT32 = 3e-5  # of the logits, which rounding changes
IN_HALF = 4  # units in the last place of shorter types
BY_SIZE = 4  # times what the size of a batch alone changes, where that is more
_ON = ContextVar("comparison", default=True)
_OF_MODELS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


@contextmanager
def without_comparison() -> Iterator[None]:
    """No pass is compared with that of one draw for the time of the context."""
    token = _ON.set(False)
    try:
        yield
    finally:
        _ON.reset(token)


@dataclass
class _Found:
    """What is known of one way to run one kind of batch."""

    wrong: bool = False
    sure: bool = False
    seen: int = 0  # batches that could not tell, because their draws hardly differ


@dataclass
class Verdicts:
    """Which ways to share a pass are exact for a model, by the kind of batch.

    They live as long as the model, so that the same batches take the same way again.
    """

    found: dict[Hashable, _Found] = field(default_factory=dict)
    said: set[Hashable] = field(default_factory=set)

    @classmethod
    def of(cls, model: nn.Module) -> "Verdicts":
        """The model's own, whichever wrapper or adapter it is reached through."""
        return _OF_MODELS.setdefault(base_of(model), cls())

    def wrong(self, kind: Hashable) -> bool:
        """Whether this way is known to be wrong."""
        return kind in self.found and self.found[kind].wrong

    def due(self, kind: Hashable) -> bool:
        """Whether to compare now.

        Batches whose draws hardly differ cannot tell; of these the 1st, 2nd, 4th, 8th, … is used.
        """
        known = self.found.setdefault(kind, _Found())
        if known.sure or not _ON.get():
            return False
        known.seen += 1
        return known.seen & (known.seen - 1) == 0

    def put(self, kind: Hashable, agrees: bool | None) -> None:
        """Keeps the result of a comparison; None if it could not tell."""
        if agrees is not None:
            self.found[kind] = _Found(wrong=not agrees, sure=True)

    def say_once(self, what: Hashable, message: str, *values: object) -> None:
        """Warns once for a model."""
        if what not in self.said:
            self.said.add(what)
            logger.warning(message, *values)


def kind_of(inputs: Batch, scorer: ClassLogits, slots: frozenset[str]) -> Hashable:
    """What a way to run a batch may depend on, but for sizes, of which only the rough ones count.

    A length of another power of two is another kind, for attention may have a window of its own.
    """
    main = main_input(inputs)
    names = tuple((name, _form(inputs[name])) for name in sorted(inputs))
    length = main.numel() // max(1, len(main))
    called_by = getattr(scorer, "__code__", type(scorer))
    device = main.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return names, length.bit_length(), _padding(inputs), called_by, slots, cast


def coincidences(inputs: Batch, draws: int, model: nn.Module) -> Hashable:
    """Which sizes are equal by chance, so that an axis of another meaning looks like the rows."""
    main = main_input(inputs)
    num_rows = len(main)
    total = draws * num_rows
    sizes = {*main.shape[1:3]}
    config = getattr(base_of(model), "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, int):
        sizes.add(heads)
    like_rows = any(size == num_rows for size in sizes)
    like_all = any(size % total == 0 or size % draws == 0 for size in sizes) if draws > 1 else False
    return num_rows == 1, draws == 1, like_rows, like_all


def _form(value: Any) -> Hashable:
    return (value.dim(), value.dtype) if isinstance(value, Tensor) else type(value)


def _padding(inputs: Batch) -> Hashable:
    """On which sides rows are padded."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    ends = (mask[:, :: max(1, mask.shape[1] - 1)] == 0).any(0)
    return tuple(ends.tolist())


def agrees(
    logits: Tensor,
    alone: Tensor,
    index: int | slice,
    model: nn.Module,
    by_size: Callable[[], Tensor] | None = None,
) -> bool | None:
    """Whether draws of a pass are what they are alone, up to rounding or 1 % of the draws' spread.

    Args:
        logits: of the pass, (S, N, …).
        alone: one draw's own, (N, …), or those of several.
        index: which of the S they are.
        model: whose types say how large rounding is.
        by_size: measures rounding, asked where a difference exceeds the usual, see `sizes_change`.

    Returns:
        None if the draws hardly differ, so that another's logits would have passed too.
    """
    own = logits[index].double()
    other = alone.double()
    if own.shape != other.shape or not torch.equal(own.isfinite(), other.isfinite()):
        return False
    gap = finite_rms(own - other)
    spread = finite_rms(logits.double().std(0)) if len(logits) > 1 else 0.0
    rounding = relative_rounding(model) * finite_rms(other)
    if gap > max(rounding, OF_SPREAD * spread):
        rounding = BY_SIZE * finite_rms(by_size().double()) if by_size else 0.0
        if gap > rounding:
            return False
    return True if len(logits) == 1 or spread > 3 * rounding else None


def sizes_change(
    score: Callable[[Batch], Tensor], inputs: Batch, alone: Tensor, times: int = 4
) -> Callable[[], Tensor]:
    """What the size of a batch alone changes of its logits: they are asked for `times` over.

    A GPU multiplies matrices of other sizes by other kernels, which add up in another order; over
    the layers of a large model in 16 bits that comes to more than a few units in the last place.

    Args:
        score: gives logits (N, C) of inputs.
        inputs: of N rows.
        alone: their logits.
        times: as often each row stands in the larger batch.
    """

    @cache
    def measured() -> Tensor:
        try:
            return score(repeat_rows(inputs, times)).unflatten(0, (times, -1)) - alone
        except Exception:  # such as too little memory: nothing is known then
            return torch.zeros(1)

    return measured


def finite_rms(values: Tensor) -> float:
    """The root mean square of what is finite."""
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).square().mean().sqrt().item()


def relative_rounding(model: nn.Module) -> float:
    """How much of the logits rounding may change, by the shortest type that the model computes in.

    Quantised weights count as bfloat16: their products are rounded by what else is in the batch.
    """
    device = device_of(model).type
    types = {parameter.dtype for parameter in model.parameters()}
    if torch.is_autocast_enabled(device):
        types.add(torch.get_autocast_dtype(device))
    if torch.get_float32_matmul_precision() != "highest":
        types.add(torch.bfloat16)
    if any(not kind.is_floating_point or kind.itemsize == 1 for kind in types):
        types.add(torch.bfloat16)
    wide = [kind for kind in types if kind.is_floating_point and kind.itemsize > 1]
    return max([IN_FLOAT32, *(IN_HALF * torch.finfo(kind).eps for kind in wide)])
