"""Tokens that all rows begin with, such as an instruction: read once for each draw, exactly."""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from bayestune.adapters import Arrivals, Slots, base_of, is_compiled
from bayestune.forward.draws import Chunk, device_of
from bayestune.forward.fingerprint import Fingerprint
from bayestune.forward.kept_tokens import KeptTokens, cache_argument, goes_by_position, is_plain

LEAST = 8  # tokens worth sharing: for fewer, putting them in front of each row costs what is saved
PASS = 512  # tokens that take as long as a pass takes whatever it reads: its launches, its weights
MAX_BYTES = 2**30  # of keys and values kept
_INPUTS = {"input_ids", "attention_mask", "position_ids", "logits_to_keep", "use_cache"}
_ON = ContextVar("common_prefix", default=True)
_OF_MEANS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


@contextmanager
def without_common_prefix() -> Iterator[None]:
    """Every row reads all its tokens for the time of the context; the logits are the same."""
    token = _ON.set(False)
    try:
        yield
    finally:
        _ON.reset(token)


@dataclass(frozen=True)
class _Rows:
    """What a pass over S copies of N rows is asked for."""

    inputs: Mapping[str, Any]
    size: int  # S
    padding: Tensor  # (N,), tokens on the left of each row
    begin: Tensor  # (2, c), ids and positions all rows begin with, none whose logits are asked for

    @classmethod
    def of(cls, inputs: Mapping[str, Any], size: int) -> Self | None:
        """None for all passes but left-padded rows and the logits of their ends."""
        keep = inputs.get("logits_to_keep")
        given = {name: value for name, value in inputs.items() if value is not None}
        if (
            given.keys() - _INPUTS
            or given.get("use_cache")
            or not isinstance(keep, int)
            or keep < 1
        ):
            return None
        ids = given.get("input_ids")
        if ids is None or ids.dim() != 2:
            return None
        columns = torch.arange(ids.shape[1], device=ids.device)
        mask = given.get("attention_mask", torch.ones_like(ids))
        places = given.get("position_ids", columns.expand_as(ids))
        if not mask.shape == places.shape == ids.shape:
            return None
        ids, mask, places = (
            value[: len(value) // size].long().cpu() for value in (ids, mask, places)
        )
        padding = (mask == 0).sum(1)
        if not torch.equal(mask, (torch.arange(ids.shape[1]) >= padding[:, None]).long()):
            return None  # not padded on the left
        if padding.any() and "position_ids" not in given:
            return None  # a model would count padding or not, by its kind
        most = max(0, ids.shape[1] - int(padding.max()) - keep)
        table = torch.stack([ids, places])
        begins = table.gather(2, (padding[:, None] + torch.arange(most)).expand(2, -1, -1))
        return cls(given, size, padding, begins[:, 0, : _agreed(begins[:, 0, None], begins)])

    def rest(self, length: int) -> dict[str, Any]:
        """The inputs behind the first `length` tokens, which come from a cache.

        Of a row with p tokens of padding, the last p of these tokens stand in the columns that are
        left: the row has them from the cache already, so the mask hides them.
        """
        rest = {**self.inputs, "input_ids": self.inputs["input_ids"][:, length:], "use_cache": True}
        if "position_ids" in rest:
            rest["position_ids"] = rest["position_ids"][:, length:]
        if self.padding.any():
            mask = rest["attention_mask"]
            columns = torch.arange(mask.shape[1])
            first = (self.padding + length)[:, None]
            seen = ((columns < length) | (columns >= first)).repeat(self.size, 1)
            rest["attention_mask"] = seen.to(mask.device, mask.dtype)
        return rest


def _agreed(one: Tensor, other: Tensor) -> int:
    """How many of the first tokens of two (…, c) are the same, in all of the leading axes."""
    length = min(one.shape[-1], other.shape[-1])
    same = (one[..., :length] == other[..., :length]).flatten(0, -2).all(0)
    return int(same.long().cumprod(0).sum())


class CommonPrefix:
    """Has a model read the tokens that all rows begin with once for each draw.

    Attention is causal: under one draw, the keys and values of the first c tokens do not depend on
    what follows, and are the same for all rows and batches that begin with them. A pass over S·N
    rows of T tokens becomes one over their last T − c, and, once, one over S rows of c tokens. The
    logits are the plain pass's up to rounding.

    The prefix is read once the tokens it would have saved so far, this batch included, exceed the
    tokens it costs: S·c and a pass. So a single call gains from it or leaves it, and a data set
    spends at most as much as it missed. What was read serves until the model, the draws or autocast
    change. At most `MAX_BYTES` are kept, of the first tokens. Passes of another kind than letter
    scoring's and expanded text scoring's (4-D masks, gradients, a cache asked for), and models that
    go by anything but keys, values and positions, are left as they are.
    """

    slots: Slots  # where the draws stand, if there are any

    def __init__(self) -> None:
        self.shared = False  # whether the last pass left tokens to what is kept
        self.compiled = False  # the model whose mean it is of
        self._arrivals = Arrivals(1)
        self._source: object = None
        self._cast: object = None
        self._fits = True
        self._forget(1)

    def _forget(self, count: int) -> None:
        self._count = count
        self._limit: int | None = None  # tokens whose keys and values fit in MAX_BYTES
        self._window: int | None = None  # of sliding attention, the smallest
        self._kept: KeptTokens | None = None
        self._before = torch.empty(2, 0)  # what the batch before began with
        self._rows = 0  # so far, of the draws together

    @classmethod
    def of_mean(cls, model: nn.Module) -> Self:
        """The one of a model's passes without draws; it lives as long as the model."""
        prefix = _OF_MEANS.setdefault(model, cls())
        source = prefix._source
        if not (isinstance(source, Fingerprint) and source.matches(model)):
            source = Fingerprint(model)
            prefix.compiled = is_compiled(model)
        return prefix.under(model, 1, source)

    def under(self, model: nn.Module, count: int, source: object) -> Self:
        """Forgets what was read under others than these S draws; their source is another object."""
        kind = device_of(model).type
        cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        if self._source is not source or (self._count, self._cast) != (count, cast):
            self._source = source
            self._cast = cast
            self._forget(count)
        return self

    @property
    def way(self) -> str:
        """What the last pass shared."""
        return "prefix" if self.shared else "together"

    @contextmanager
    def computing(self, chunk: Chunk, arrivals: Arrivals) -> Iterator[nn.Module]:
        """For the time of a pass over S·N rows under some of the draws."""
        model = self.slots.model
        self._arrivals = arrivals
        holding = self.slots.holding(chunk.stacks, arrivals)
        with holding, self.sharing(model, chunk.start, chunk.size):
            yield model

    @contextmanager
    def sharing(self, model: nn.Module, start: int = 0, size: int = 1) -> Iterator[None]:
        """For the time of a pass over S·N rows under what is in the slots now."""
        self.shared = False
        base = base_of(model)
        name = cache_argument(base)
        if name is None or not (_ON.get() and self._fits and goes_by_position(base)):
            yield
            return

        def share(_: nn.Module, args: Any, inputs: dict[str, Any]) -> Any:
            rows = None if args or torch.is_grad_enabled() else _Rows.of(inputs, size)
            if rows is None:
                return None
            length = self._known(rows, start, base, name)
            if length < LEAST or self._kept is None:
                return None
            self.shared = True
            return args, {**rows.rest(length), name: self._kept.cache(start, size, length)}

        with model.register_forward_pre_hook(share, with_kwargs=True):
            yield

    def _known(self, rows: _Rows, start: int, base: nn.Module, name: str) -> int:
        """How many tokens the rows need not read, after the common ones are read if that pays."""
        begin = rows.begin[:, : self._limit]
        worth = None if start else self._worth(begin, len(rows.padding), rows.size)
        if worth is not None:
            self._kept = KeptTokens(worth, [False] * self._count)
        if self._kept is None or _agreed(self._kept.tokens, begin) < LEAST:
            return 0
        if not all(self._kept.done[start : start + rows.size]):
            self._read(rows, start, base, name, self._kept)
        if self._kept is None:
            return 0
        if self._window is not None and rows.inputs["input_ids"].shape[1] >= self._window:
            return 0  # a window that is not longer than a row would count the hidden columns
        return _agreed(self._kept.tokens, begin)

    def _worth(self, begin: Tensor, num_rows: int, size: int) -> Tensor | None:
        """The tokens to read now; None where what is kept will do, or reading does not pay yet."""
        known = 0 if self._kept is None else _agreed(self._kept.tokens, begin)
        wanted = begin[:, : _agreed(self._before, begin)]
        self._before = begin
        self._rows += self._count * num_rows
        if wanted.shape[1] < known + LEAST:  # nothing new in common with the batch before
            wanted = begin
            self._rows = self._count * num_rows
        length = wanted.shape[1]
        passes = -(-self._count // size)
        cost = self._count * length + PASS * passes
        pays = self._rows * (length - known) > cost
        return wanted if pays and length >= known + LEAST else None

    def _read(self, rows: _Rows, start: int, base: nn.Module, name: str, kept: KeptTokens) -> None:
        """Reads the common tokens under the draws that are in the model now."""
        tokens = kept.tokens.to(rows.inputs["input_ids"].device)
        ids, places = tokens[:, None].expand(-1, rows.size, -1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": places}
        given = {key: value for key, value in given.items() if key in rows.inputs}
        # not `base(…)`: PEFT, too, goes past its hooks, of which this runs in one
        with self._arrivals.expecting(rows.size):
            output = base.forward(**given, use_cache=True, logits_to_keep=1)  # type: ignore[operator]
        read: Any = getattr(output, name, None)
        if not is_plain(read, rows.size, ids.shape[1]):
            self._fits = False
            self._kept = None
            return
        known = [value for layer in read.layers for value in (layer.keys, layer.values)]
        windows = [layer.sliding_window for layer in read.layers if layer.is_sliding]
        self._window = min(windows, default=None)
        of_token = sum(value.nbytes for value in known) // ids.numel()
        self._limit = MAX_BYTES // (of_token * self._count)
        kept.tokens = kept.tokens[:, : self._limit]
        kept.put(start, known)
