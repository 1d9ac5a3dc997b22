"""Tokens that all rows begin with, a task's instruction for one: read once for each draw, exactly, and then kept."""

import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from bayestune.adapters import base_of, is_classifier
from bayestune.forward.fingerprint import Fingerprint

LEAST = 8  # tokens worth sharing: for fewer, putting them in front of each row's own costs what is saved
PASS = 512  # as many tokens take the time that a pass takes whatever it reads: its launches, its weights read or cast
MAX_BYTES = 2**30  # of keys and values kept
_CACHE = (
    "cache",
    "past_key_values",
)  # what a forward pass takes and gives, by the version of transformers
_INPUTS = {"input_ids", "attention_mask", "position_ids", "logits_to_keep", "use_cache"}
_CHANGING_ROPE = ("dynamic", "longrope")  # these turn a token by the length of what is read with it
_ON = ContextVar("common_prefix", default=True)


def cache_argument(base: nn.Module) -> str | None:
    """The name by which a model takes and gives what it has read; None for one that keeps none."""
    accepted = inspect.signature(base.forward).parameters  # type: ignore[arg-type]
    return (
        None if is_classifier(base) else next((name for name in _CACHE if name in accepted), None)
    )


@contextmanager
def without_common_prefix() -> Iterator[None]:
    """Every row reads all its tokens for the time of the context; for comparisons, the logits are the same."""
    token = _ON.set(False)
    try:
        yield
    finally:
        _ON.reset(token)


class _KeptLayer(DynamicLayer):
    """Keys and values (S, heads, c, width) that come in front of those of S·N rows; what the rows add is not kept."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens, (S·N, heads, T, width)."""
        assert self.keys is not None
        assert self.values is not None
        return _in_front(self.keys, key_states), _in_front(self.values, value_states)


def _in_front(kept: Tensor, own: Tensor) -> Tensor:
    own = own.unflatten(0, (len(kept), -1))
    return torch.cat([kept[:, None].expand(-1, own.shape[1], -1, -1, -1), own], -2).flatten(0, 1)


@dataclass(frozen=True)
class _Rows:
    """What a pass over S copies of N rows is asked for.

    Args:
        padding: tokens on the left of each row, (N,).
        begin: ids and positions of the tokens that all rows begin with, (2, c), those left out that must be read.
    """

    padding: Tensor
    begin: Tensor

    @classmethod
    def of(cls, inputs: Mapping[str, Any], size: int) -> Self | None:
        """None where the pass is of another kind: anything but left-padded rows and the logits of their ends."""
        ids, mask, positions = (
            inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids")
        )
        keep, given = (
            inputs.get("logits_to_keep"),
            {name for name, value in inputs.items() if value is not None},
        )
        if (
            given - _INPUTS
            or inputs.get("use_cache")
            or not isinstance(keep, int)
            or keep < 1
            or ids is None
        ):
            return None
        if ids.dim() != 2 or any(
            value is not None and value.shape != ids.shape for value in (mask, positions)
        ):
            return None
        mask = torch.ones_like(ids) if mask is None else mask
        places = (
            torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            if positions is None
            else positions
        )
        table = torch.stack(
            [value[: len(ids) // size].long() for value in (ids, mask, places)]
        ).cpu()
        padding = (table[1] == 0).sum(1)
        padded_left = torch.equal(table[1], (torch.arange(ids.shape[1]) >= padding[:, None]).long())
        if not padded_left or (
            positions is None and padding.any()
        ):  # a model would count padding or not, by its kind
            return None
        most = max(0, ids.shape[1] - int(padding.max()) - keep)
        begins = table[::2].gather(2, (padding[:, None] + torch.arange(most)).expand(2, -1, -1))
        return cls(padding, begins[:, 0, : _agreed(begins[:, 0, None], begins)])

    def rest(self, inputs: Mapping[str, Any], length: int, size: int) -> dict[str, Any]:
        """The inputs behind the first `length` tokens, which come from a cache.

        Of a row with p tokens of padding, the last p of these tokens are in the columns that are left: it has them
        from the cache already, so that the mask hides them.
        """
        rest = {**inputs, "input_ids": inputs["input_ids"][:, length:], "use_cache": True}
        if inputs.get("position_ids") is not None:
            rest["position_ids"] = inputs["position_ids"][:, length:]
        if self.padding.any():
            mask = inputs["attention_mask"]
            columns, first = torch.arange(mask.shape[1]), (self.padding + length)[:, None]
            seen = ((columns < length) | (columns >= first)).repeat(size, 1)
            rest["attention_mask"] = seen.to(mask.device, mask.dtype)
        return rest


def _agreed(one: Tensor, other: Tensor) -> int:
    """How many of the first tokens of two (…, c) are the same, in all of the leading axes."""
    length = min(one.shape[-1], other.shape[-1])
    same = (one[..., :length] == other[..., :length]).flatten(0, -2).all(0)
    return int(same.long().cumprod(0).sum())


@dataclass
class _Read:
    """Keys and values (S, heads, c, width) of the tokens (2, c), layer by layer, and of which draws they are there."""

    tokens: Tensor
    layers: list[tuple[Tensor, Tensor]]
    done: list[bool]

    def put(self, start: int, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Takes in those of the draws from `start` on."""
        size, length = len(layers[0][0]), self.tokens.shape[1]
        if not self.layers:
            count = len(self.done)
            self.layers = [
                tuple(v.new_empty(count, *v[0, :, :length].shape) for v in layer)
                for layer in layers
            ]  # type: ignore[misc]
        for kept, layer in zip(self.layers, layers, strict=True):
            for whole, part in zip(kept, layer, strict=True):
                whole[start : start + size] = part[:, :, :length]
        self.done[start : start + size] = [True] * size

    def cache(self, start: int, size: int, length: int) -> DynamicCache:
        """The first `length` tokens of some of the draws, as a model takes them."""
        cache, part = DynamicCache(), slice(start, start + size)
        cache.layers[:] = [
            _KeptLayer(*(kept[part, :, :length] for kept in layer)) for layer in self.layers
        ]
        return cache


class CommonPrefix:
    """Has a model read the tokens that all rows begin with once for each draw, and keeps their keys and values.

    Attention is causal: under one draw, the keys and values of the first c tokens do not depend on what follows, and
    are the same for all rows and batches that begin with them. A pass over S·N rows of T tokens becomes one over
    their last T − c, and, once, one over S rows of c tokens. The logits are the plain pass's up to rounding.

    When to read: as soon as what all batches so far, this one included, could have saved exceeds what reading costs,
    S·c tokens and a pass. So a single call that is one of its own gains from it or leaves it, and over a data set at
    most as much is spent as was missed. What was read serves until the model, the draws or autocast change. At most
    `MAX_BYTES` are kept, of the first tokens. Passes of another kind than letter scoring's and expanded text scoring's
    (4-D masks, gradients, a cache asked for), and models whose tokens go by anything but keys, values and positions,
    are left as they are.
    """

    def __init__(self) -> None:
        self._snapshot: Fingerprint | None = None
        self._key: object = None
        self._fits = True
        self._forget(1)

    def _forget(self, count: int) -> None:
        self._count, self._limit, self._window = count, None, None
        self._read: _Read | None = None
        self._before, self._rows = torch.empty(2, 0), 0

    @classmethod
    def of_mean(cls, model: nn.Module) -> Self:
        """That of a model's passes without draws; it lives as long as the model."""
        prefix = _OF_MEANS.setdefault(model, cls())
        if prefix._snapshot is None or not prefix._snapshot.matches(model):
            prefix._snapshot = Fingerprint(model)
            prefix._key = None
        return prefix.under(model, 1, prefix._snapshot)

    def under(self, model: nn.Module, count: int, source: object) -> Self:
        """Forgets what was read under others.

        Args:
            model: as it is without the draws.
            count: S.
            source: where the draws are from, an object that is another when they are.
        """
        kind = next(model.parameters()).device.type
        cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        if self._key is None or self._key[0] is not source or self._key[1:] != (count, cast):  # type: ignore[index]
            self._key = source, count, cast
            self._forget(count)
        return self

    @contextmanager
    def sharing(self, model: nn.Module, start: int = 0, size: int = 1) -> Iterator[None]:
        """For the time of a pass over S·N rows: those of the draws from `start` on, `size` of them."""
        base = base_of(model)
        name = cache_argument(base) if _ON.get() and self._fits and _by_position(base) else None

        def shared(
            _: nn.Module, args: Any, inputs: dict[str, Any]
        ) -> tuple[Any, dict[str, Any]] | None:
            rows = (
                None if args or torch.is_grad_enabled() or name is None else _Rows.of(inputs, size)
            )
            length = self._known(base, inputs, rows, start, size, name) if rows and name else 0
            if length < LEAST or rows is None or self._read is None:
                return None
            return args, {
                **rows.rest(inputs, length, size),
                name: self._read.cache(start, size, length),
            }

        hook = model.register_forward_pre_hook(shared, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _known(
        self,
        base: nn.Module,
        inputs: Mapping[str, Any],
        rows: _Rows,
        start: int,
        size: int,
        name: str,
    ) -> int:
        """How many tokens need not be read by each row, after the common ones are read if that pays."""
        begin = rows.begin[:, : self._limit]
        if start == 0 and (worth := self._worth(begin, len(rows.padding), size)) is not None:
            self._read = _Read(worth, [], [False] * self._count)
        if self._read is None or _agreed(self._read.tokens, begin) < LEAST:
            return 0
        if not all(self._read.done[start : start + size]):
            self._fill(base, inputs, start, size, name)
        if self._read is None or (
            self._window is not None and inputs["input_ids"].shape[1] >= self._window
        ):
            return 0  # a window that is not longer than a row would count the hidden columns
        return _agreed(self._read.tokens, begin)

    def _worth(self, begin: Tensor, num_rows: int, size: int) -> Tensor | None:
        """The tokens to read now; None where what is kept will do, or reading does not pay yet."""
        known = 0 if self._read is None else _agreed(self._read.tokens, begin)
        wanted, self._rows = (
            begin[:, : _agreed(self._before, begin)],
            self._rows + self._count * num_rows,
        )
        if (
            wanted.shape[1] < known + LEAST
        ):  # nothing new in common with the batch before: only this one counts
            wanted, self._rows = begin, self._count * num_rows
        self._before, length = begin, wanted.shape[1]
        cost = self._count * length + PASS * -(-self._count // size)
        return wanted if length >= known + LEAST and self._rows * (length - known) > cost else None

    def _fill(
        self, base: nn.Module, inputs: Mapping[str, Any], start: int, size: int, name: str
    ) -> None:
        """Reads the common tokens under the draws that are in the model now."""
        assert self._read is not None
        ids, places = (
            row.to(inputs["input_ids"].device).expand(size, -1) for row in self._read.tokens
        )
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": places}
        given = {key: value for key, value in given.items() if inputs.get(key) is not None}
        # not `base(…)`: PEFT, too, goes past its hooks, of which this runs in one
        read: Any = getattr(base.forward(**given, use_cache=True, logits_to_keep=1), name, None)  # type: ignore[operator]
        if not _plain(read, size, ids.shape[1]):
            self._fits, self._read = False, None
            return
        layers = [(layer.keys, layer.values) for layer in read.layers]
        self._window = min(
            (layer.sliding_window for layer in read.layers if layer.is_sliding), default=None
        )
        of_token = sum(value.nbytes for layer in layers for value in layer) // ids.numel()
        self._limit = MAX_BYTES // (of_token * self._count)
        self._read.tokens = self._read.tokens[:, : self._limit]
        self._read.put(start, layers)


_OF_MEANS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def _plain(read: Any, size: int, length: int) -> bool:
    """Whether a model remembers keys and values of each token and nothing else."""
    layers: list[Any] = list(read.layers) if type(read) is DynamicCache else []
    if not layers or any(
        type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
    ):
        return False
    kept = [value for layer in layers for value in (layer.keys, layer.values)]
    return all(
        value is not None and value.dim() == 4 and (len(value), value.shape[2]) == (size, length)
        for value in kept
    )


def _by_position(base: nn.Module) -> bool:
    """Whether a token's keys and values depend on those before it and on its position id alone."""
    if not isinstance(base, PreTrainedModel) or getattr(base, "_is_stateful", False):
        return False
    config: Any = base.config.get_text_config()
    refused = ("alibi", "is_encoder_decoder", "use_bidirectional_attention", "num_kv_shared_layers")
    rope = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None))
    changing = any(f"'{kind}'" in rope for kind in _CHANGING_ROPE)
    return not changing and not any(getattr(config, name, None) for name in refused)
