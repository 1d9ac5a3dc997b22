"""Whether draws that share a pass give the logits of each alone: found once for a kind of batch."""

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

# A difference is rounding, or does not matter, up to the largest of
OF_SPREAD = 0.01  # this share of the draws' spread
IN_FLOAT32 = 3e-5  # this share of the logits
IN_HALF = 4  # so many units in the last place, where the model computes in a shorter type
BY_SIZE = 4  # so many times what the size of a batch alone changes
_ON = ContextVar("comparison", default=True)
_OF_MODELS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


@contextmanager
def without_comparison() -> Iterator[None]:
    """A context in which passes are not compared with those of one draw."""
    token = _ON.set(False)
    try:
        yield
    finally:
        _ON.reset(token)


@dataclass
class _Verdict:
    """What is known of one way to run one kind of batch."""

    wrong: bool = False
    sure: bool = False
    seen: int = 0  # batches while it was not sure, because their draws hardly differ


@dataclass
class Verdicts:
    """Which ways to share a pass are exact for a model, by the kind of batch.

    They live as long as the model, so that the same batches take the same way again.
    """

    by_kind: dict[Hashable, _Verdict] = field(default_factory=dict)
    warned: set[Hashable] = field(default_factory=set)

    @classmethod
    def of(cls, model: nn.Module) -> "Verdicts":
        """The model's own, whichever wrapper or adapter it is reached through."""
        return _OF_MODELS.setdefault(base_of(model), cls())

    def wrong(self, kind: Hashable) -> bool:
        """Whether this way is known to be wrong."""
        return kind in self.by_kind and self.by_kind[kind].wrong

    def due(self, kind: Hashable) -> bool:
        """Whether to compare now.

        Batches whose draws hardly differ cannot tell; of these the 1st, 2nd, 4th, 8th, … is
        compared.
        """
        verdict = self.by_kind.setdefault(kind, _Verdict())
        if verdict.sure or not _ON.get():
            return False
        verdict.seen += 1
        return verdict.seen & (verdict.seen - 1) == 0  # a power of two

    def put(self, kind: Hashable, agrees: bool | None) -> None:
        """Keeps the result of a comparison; None if it could not tell."""
        if agrees is not None:
            self.by_kind[kind] = _Verdict(wrong=not agrees, sure=True)

    def say_once(self, what: Hashable, message: str, *values: object) -> None:
        """Logs a warning, once for a model and `what` it is about."""
        if what not in self.warned:
            self.warned.add(what)
            logger.warning(message, *values)


def kind_of(inputs: Batch, scorer: ClassLogits, slots: frozenset[str]) -> Hashable:
    """A key that batches share if a way to run them is exact for all of them or for none.

    It holds names, types, padding, scorer, slots and autocast. Of sizes it holds only the length's
    power of two, because attention may have a window of its own.

    Args:
        inputs: the batch.
        scorer: which gives the logits.
        slots: names of those that are drawn.
    """
    main = main_input(inputs)
    names = tuple((name, _form(inputs[name])) for name in sorted(inputs))
    length = main.numel() // max(1, len(main))
    called_by = getattr(scorer, "__code__", type(scorer))
    device = main.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return names, length.bit_length(), _padding(inputs), called_by, slots, cast


def coincidences(inputs: Batch, draws: int, model: nn.Module) -> Hashable:
    """Which sizes are equal by chance, so that an axis of another meaning looks like the rows.

    Args:
        inputs: the batch of N rows.
        draws: S of the pass.
        model: whose number of heads is one of the sizes.
    """
    main = main_input(inputs)
    num_rows = len(main)
    total = draws * num_rows
    sizes = {*main.shape[1:3]}
    config = getattr(base_of(model), "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, int):
        sizes.add(heads)
    like_rows = any(size == num_rows for size in sizes)
    like_all = draws > 1 and any(size % total == 0 or size % draws == 0 for size in sizes)
    return num_rows == 1, draws == 1, like_rows, like_all


def _form(value: Any) -> Hashable:
    """A tensor's number of axes and type of numbers; of anything else, its type."""
    return (value.dim(), value.dtype) if isinstance(value, Tensor) else type(value)


def _padding(inputs: Batch) -> Hashable:
    """Whether any row is padded at its first, and at its last place; None without a 2-D mask."""
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
    """Whether draws have in a pass the logits they have alone, up to rounding or 1 % of the spread.

    Args:
        logits: of the pass, (S, N, …).
        alone: those of one draw alone, (N, …), or of several, (draws, N, …).
        index: which of the S draws these are.
        model: whose types say how large rounding is.
        by_size: measures rounding; called only if a difference exceeds the usual rounding, see
            `sizes_change`.

    Returns:
        True or False; None if the draws hardly differ, so that another draw's logits would have
        passed too.
    """
    in_pass = logits[index].double()
    expected = alone.double()
    if in_pass.shape != expected.shape:
        return False
    if not torch.equal(in_pass.isfinite(), expected.isfinite()):
        return False
    gap = finite_rms(in_pass - expected)
    spread = finite_rms(logits.double().std(0)) if len(logits) > 1 else 0.0
    rounding = relative_rounding(model) * finite_rms(expected)
    if gap > max(rounding, OF_SPREAD * spread):
        rounding = BY_SIZE * finite_rms(by_size().double()) if by_size else 0.0
        if gap > rounding:
            return False
    return True if len(logits) == 1 or spread > 3 * rounding else None


def sizes_change(
    score: Callable[[Batch], Tensor], inputs: Batch, alone: Tensor, times: int = 4
) -> Callable[[], Tensor]:
    """Gives a function that measures how much the size of a batch alone changes its logits.

    A GPU multiplies matrices of other sizes by other kernels, which add up in another order; over
    the layers of a large model in 16 bits that comes to more than a few units in the last place.

    Args:
        score: maps a batch to its logits (N, C).
        inputs: a batch of N rows.
        alone: its logits.
        times: how often each row stands in the larger batch.

    Returns:
        A function that runs the larger batch when it is first called, and returns the differences
        (times, N, C); 0 if that batch cannot be run.
    """

    @cache
    def measured() -> Tensor:
        try:
            return score(repeat_rows(inputs, times)).unflatten(0, (times, -1)) - alone
        except Exception:  # such as too little memory
            return torch.zeros(1)

    return measured


def finite_rms(values: Tensor) -> float:
    """The root mean square, with 0 for values that are not finite."""
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).square().mean().sqrt().item()


def relative_rounding(model: nn.Module) -> float:
    """The share of the logits that rounding may change, by the shortest type the model computes in.

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
