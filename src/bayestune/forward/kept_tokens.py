"""Keys and values of tokens that a causal model has read, kept for later passes."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from bayestune.adapters import is_classifier

KeysAndValues = tuple[Tensor, Tensor]

_CACHE = ("cache", "past_key_values")  # the argument's name, by the version of transformers
_CHANGING_ROPE = ("dynamic", "longrope")  # these turn a token by the length of what is read with it
_BY_MORE_THAN_POSITION = (
    "alibi",
    "is_encoder_decoder",
    "use_bidirectional_attention",
    "num_kv_shared_layers",
)


def cache_argument(base: nn.Module) -> str | None:
    """The name by which a model takes and gives what it has read; None for one that keeps none."""
    if is_classifier(base):
        return None
    accepted = inspect.signature(base.forward).parameters  # type: ignore[arg-type]
    return next((name for name in _CACHE if name in accepted), None)


def goes_by_position(base: nn.Module) -> bool:
    """Whether keys and values depend on the tokens before and the position id alone."""
    if not isinstance(base, PreTrainedModel) or getattr(base, "_is_stateful", False):
        return False
    config: Any = base.config.get_text_config()
    rope = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None))
    changing = any(f"'{kind}'" in rope for kind in _CHANGING_ROPE)
    return not changing and not any(getattr(config, name, None) for name in _BY_MORE_THAN_POSITION)


def is_plain(read: Any, size: int, length: int) -> bool:
    """Whether a model remembers keys and values of each of (size, length) tokens, nothing else."""
    if type(read) is not DynamicCache or not read.layers:
        return False
    for layer in read.layers:
        kept: Any = layer
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return False
        for value in (kept.keys, kept.values):
            if value is None or value.dim() != 4:
                return False
            if (value.shape[0], value.shape[2]) != (size, length):
                return False
    return True


class _KeptLayer(DynamicLayer):
    """Keys and values (S, heads, c, width) in front of those of S·N rows, which are not kept."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys = keys
        self.values = values
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens, (S·N, heads, T, width)."""
        assert self.keys is not None
        assert self.values is not None
        return _in_front(self.keys, key_states), _in_front(self.values, value_states)


def _in_front(kept: Tensor, own: Tensor) -> Tensor:
    own = own.unflatten(0, (len(kept), -1))
    kept = kept[:, None].expand(-1, own.shape[1], -1, -1, -1)
    return torch.cat([kept, own], -2).flatten(0, 1)


@dataclass
class KeptTokens:
    """Tokens and their keys and values under S draws.

    Args:
        tokens: ids and positions (2, c).
        done: of which draws the keys and values are there, S bools.
        layers: keys and values (S, heads, c, width) of each layer.
    """

    tokens: Tensor
    done: list[bool]
    layers: list[KeysAndValues] = field(default_factory=list)

    def put(self, start: int, layers: list[KeysAndValues]) -> None:
        """Takes in the keys and values of the draws from `start` on."""
        size = len(layers[0][0])
        length = self.tokens.shape[1]
        if not self.layers:
            self.layers = [(self._room(keys), self._room(values)) for keys, values in layers]
        for kept, layer in zip(self.layers, layers, strict=True):
            for whole, part in zip(kept, layer, strict=True):
                whole[start : start + size] = part[:, :, :length]
        self.done[start : start + size] = [True] * size

    def _room(self, like: Tensor) -> Tensor:
        return like.new_empty(len(self.done), *like[0, :, : self.tokens.shape[1]].shape)

    def cache(self, start: int, size: int, length: int) -> DynamicCache:
        """The first `length` tokens of some of the draws, as a model takes them."""
        cache = DynamicCache()
        part = slice(start, start + size)
        cache.layers[:] = [
            _KeptLayer(keys[part, :, :length], values[part, :, :length])
            for keys, values in self.layers
        ]
        return cache
