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

LEAST = 8  # tokens worth sharing; with fewer, putting them in front of each row costs what is saved
PASS = 512  # a pass's fixed cost (launches, reading the weights), as the tokens that take as long
MAX_BYTES = 2**30  # of keys and values kept
_INPUTS = {"input_ids", "attention_mask", "position_ids", "logits_to_keep", "use_cache"}
_ON = ContextVar("common_prefix", default=True)
_OF_MEANS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


@contextmanager
def without_common_prefix() -> Iterator[None]:
    """A context in which every row reads all its tokens; the logits are the same."""
    token = _ON.set(False)
    try:
        yield
    finally:
        _ON.reset(token)


@dataclass(frozen=True)
class _Rows:
    """The inputs of a pass over S copies of N left-padded rows, and what the rows begin with.

    Args:
        inputs: of the model, by name; those that are None are left out.
        size: S.
        padding: tokens of padding on the left of each row, (N,).
        begin: ids and positions that all rows begin with, (2, c); tokens whose logits are asked for
            are not among them.
    """

    inputs: Mapping[str, Any]
    size: int
    padding: Tensor
    begin: Tensor

    @classmethod
    def of(cls, inputs: Mapping[str, Any], size: int) -> Self | None:
        """Those of a pass; None unless rows are padded on the left and their ends are asked for."""
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
            return None  # whether positions count padding differs between models
        most = max(0, ids.shape[1] - int(padding.max()) - keep)
        ids_and_places = torch.stack([ids, places])
        first_columns = padding[:, None] + torch.arange(most)
        begins = ids_and_places.gather(2, first_columns.expand(2, -1, -1))  # (2, N, most)
        of_first_row = begins[:, 0]
        length = _num_agreed(of_first_row[:, None], begins)
        return cls(given, size, padding, of_first_row[:, :length])

    def rest(self, length: int) -> dict[str, Any]:
        """The inputs after the first `length` columns, for whose tokens a cache stands.

        The cache holds the rows' first `length` tokens. A row with p tokens of padding has the last
        p of these in the remaining columns as well, so the mask hides them there.
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


def _num_agreed(one: Tensor, other: Tensor) -> int:
    """How many first tokens of two tensors (…, c) are the same, in all of their leading axes."""
    length = min(one.shape[-1], other.shape[-1])
    same = (one[..., :length] == other[..., :length]).flatten(0, -2).all(0)
    return int(same.long().cumprod(0).sum())


class CommonPrefix:
    """Has a model read the tokens that all rows begin with once for each draw.

    Attention is causal: under one draw, the keys and values of the first c tokens do not depend on
    what follows, and are the same for all rows and batches that begin with them. A pass over S·N
    rows of T tokens becomes one over their last T − c, and, once, one over S rows of c tokens. The
    logits are the plain pass's up to rounding.

    The prefix is read when the tokens that it would have saved so far, in this batch too, exceed
    the tokens that reading it costs: S·c and a pass. So a single call either gains by it or does
    without, and over a data set the cost is never more than what was left unsaved before. What was
    read serves until the model, the draws or autocast change. At most `MAX_BYTES` are kept, of the
    first tokens. Passes unlike those of letter scoring and expanded text scoring (4-D masks,
    gradients, a cache asked for), and models that go by anything but keys, values and positions,
    run as they are.
    """

    slots: Slots  # where the draws stand, if there are any

    def __init__(self) -> None:
        self.shared = False  # whether the last pass took tokens from what is kept
        self.compiled = False  # whether the model is, if this is of its mean
        self._arrivals = Arrivals(1)
        self._source: object = None  # what the kept tokens were read under, compared by identity
        self._cast: object = None  # autocast's type, False without autocast
        self._fits = True  # whether the model's cache was plain, as far as is known
        self._forget(1)

    def _forget(self, count: int) -> None:
        self._count = count  # S
        self._limit: int | None = None  # tokens whose keys and values fit in MAX_BYTES
        self._window: int | None = None  # of sliding attention, the smallest
        self._kept: KeptTokens | None = None
        self._begin_before = torch.empty(2, 0)  # what the rows of the last batch began with
        self._rows = 0  # S·N summed over the batches that began as the present one does

    @classmethod
    def of_mean(cls, model: nn.Module) -> Self:
        """The one for a model's passes without draws; it lives as long as the model."""
        prefix = _OF_MEANS.setdefault(model, cls())
        source = prefix._source
        if not (isinstance(source, Fingerprint) and source.matches(model)):
            source = Fingerprint(model)
            prefix.compiled = is_compiled(model)
        return prefix.under(model, 1, source)

    def under(self, model: nn.Module, count: int, source: object) -> Self:
        """This one, after forgetting what was read under another source, S or autocast.

        Args:
            model: the model.
            count: S.
            source: an object that is another one whenever model or draws are.
        """
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
        """A context for a pass over S·N rows under some of the draws; gives the model."""
        model = self.slots.model
        self._arrivals = arrivals
        holding = self.slots.holding(chunk.stacks, arrivals)
        with holding, self.sharing(model, chunk.start, chunk.size):
            yield model

    @contextmanager
    def sharing(self, model: nn.Module, start: int = 0, size: int = 1) -> Iterator[None]:
        """A context for a pass over S·N rows under what is in the slots now.

        Args:
            model: the model.
            start: the place of the first of these draws among all.
            size: how many draws these are.
        """
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
            length = self._num_kept(rows, start, base, name)
            if length < LEAST or self._kept is None:
                return None
            self.shared = True
            return args, {**rows.rest(length), name: self._kept.cache(start, size, length)}

        with model.register_forward_pre_hook(share, with_kwargs=True):
            yield

    def _num_kept(self, rows: _Rows, start: int, base: nn.Module, name: str) -> int:
        """How many tokens the rows need not read, after the common ones are read if that pays."""
        begin = rows.begin[:, : self._limit]
        if start == 0:  # decided in the first pass of a batch, for all its draws
            to_read = self._worth_reading(begin, len(rows.padding), rows.size)
            if to_read is not None:
                self._kept = KeptTokens(to_read, [False] * self._count)
        if self._kept is None or _num_agreed(self._kept.tokens, begin) < LEAST:
            return 0
        if not all(self._kept.done[start : start + rows.size]):
            self._read(rows, start, base, name, self._kept)
        if self._kept is None:
            return 0
        if self._window is not None and rows.inputs["input_ids"].shape[1] >= self._window:
            return 0  # a window no longer than the row would count the columns that the mask hides
        return _num_agreed(self._kept.tokens, begin)

    def _worth_reading(self, begin: Tensor, num_rows: int, size: int) -> Tensor | None:
        """The tokens to read now; None where what is kept will do, or reading does not pay yet."""
        num_kept = 0 if self._kept is None else _num_agreed(self._kept.tokens, begin)
        wanted = begin[:, : _num_agreed(self._begin_before, begin)]
        self._begin_before = begin
        self._rows += self._count * num_rows
        if wanted.shape[1] < num_kept + LEAST:  # nothing new in common with the batch before
            wanted = begin
            self._rows = self._count * num_rows
        length = wanted.shape[1]
        passes = -(-self._count // size)
        cost = self._count * length + PASS * passes
        pays = self._rows * (length - num_kept) > cost
        return wanted if pays and length >= num_kept + LEAST else None

    def _read(self, rows: _Rows, start: int, base: nn.Module, name: str, kept: KeptTokens) -> None:
        """Reads the common tokens under the draws that are in the model now."""
        tokens = kept.tokens.to(rows.inputs["input_ids"].device)
        ids, places = tokens[:, None].expand(-1, rows.size, -1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": places}
        given = {key: value for key, value in given.items() if key in rows.inputs}
        # not `base(…)`: this runs in one of its hooks, and PEFT calls `forward` past them as well
        with self._arrivals.expecting(rows.size):
            output = base.forward(**given, use_cache=True, logits_to_keep=1)  # type: ignore[operator]
        cache: Any = getattr(output, name, None)
        if not is_plain(cache, rows.size, ids.shape[1]):
            self._fits = False
            self._kept = None
            return
        states = []
        for layer in cache.layers:
            states += [layer.keys, layer.values]
        windows = [layer.sliding_window for layer in cache.layers if layer.is_sliding]
        self._window = min(windows, default=None)
        bytes_of_token = sum(state.nbytes for state in states) // ids.numel()
        self._limit = MAX_BYTES // (bytes_of_token * self._count)
        kept.tokens = kept.tokens[:, : self._limit]
        kept.put(start, states)
