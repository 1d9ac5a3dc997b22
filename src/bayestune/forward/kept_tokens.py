"""Keys and values of tokens that a causal model has read, kept for later passes."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from bayestune.adapters import is_classifier

_CACHE = ("cache", "past_key_values")  # the argument's name, by the version of transformers
_CHANGING_ROPE = ("dynamic", "longrope")  # these turn a token by the length of what is read with it
_ENCODER_LIKE = ("is_encoder_decoder", "use_bidirectional_attention")
_KNOWN_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers")
_BY_MORE_THAN_POSITION = ("alibi", "num_kv_shared_layers", *_ENCODER_LIKE)


def cache_argument(base: nn.Module) -> str | None:
    """The name by which a model takes and gives what it has read; None for one that keeps none."""
    if is_classifier(base):
        return None
    accepted = inspect.signature(base.forward).parameters  # type: ignore[arg-type]
    return next((name for name in _CACHE if name in accepted), None)


def has_own_window(config: Any) -> bool:
    """Whether attention sees a window of columns that caches and masks do not tell of.

    GPT-Neo's local layers do, and whatever else names a window other than the usual sliding one.
    """
    kinds = getattr(config, "attention_layers", None)
    if kinds is not None:
        return "local" in kinds
    for name, value in config.to_dict().items():
        window = "window" in name or name.startswith("local_")
        if window and name not in _KNOWN_WINDOWS and isinstance(value, int) and value > 0:
            return True
    return False


def goes_by_position(base: nn.Module) -> bool:
    """Whether keys and values depend on the tokens before and the position id alone."""
    if not isinstance(base, PreTrainedModel) or getattr(base, "_is_stateful", False):
        return False
    config: Any = base.config.get_text_config()
    rope = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None))
    if has_own_window(config):
        return False
    changing = any(f"'{kind}'" in rope for kind in _CHANGING_ROPE)
    return not changing and not any(getattr(config, name, None) for name in _BY_MORE_THAN_POSITION)


def is_plain(read: Any, size: int, length: int) -> bool:
    """Whether a model remembers keys and values of each of (size, length) tokens, nothing else."""
    if type(read) is not DynamicCache or not read.layers:
        return False
    layers: list[Any] = read.layers
    for layer in layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return False
        for value in (layer.keys, layer.values):  # (size, heads, length, width)
            if value is None or value.dim() != 4 or value.shape[::2] != (size, length):
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
        kept: Any = self
        return _in_front(kept.keys, key_states), _in_front(kept.values, value_states)


def _in_front(kept: Tensor, own: Tensor) -> Tensor:
    own = own.unflatten(0, (len(kept), -1))
    kept = kept[:, None].expand(-1, own.shape[1], -1, -1, -1)
    return torch.cat([kept, own], -2).flatten(0, 1)


@dataclass
class KeptTokens:
    """Tokens and their keys and values under S draws: a layer's keys, then its values."""

    tokens: Tensor  # ids and positions (2, c)
    done: list[bool]  # of which draws the keys and values are there
    known: list[Tensor] = field(default_factory=list)  # each (S, heads, c, width)

    def put(self, start: int, known: list[Tensor]) -> None:
        """Takes in the keys and values of the draws from `start` on."""
        part = slice(start, start + len(known[0]))
        first = [value[:, :, : self.tokens.shape[1]] for value in known]
        if not self.known:
            self.known = [value.new_empty(len(self.done), *value.shape[1:]) for value in first]
        for whole, value in zip(self.known, first, strict=True):
            whole[part] = value
        self.done[part] = [True] * len(known[0])

    def cache(self, start: int, size: int, length: int) -> DynamicCache:
        """The first `length` tokens of some of the draws, as a model takes them."""
        cache = DynamicCache()
        first = [value[start : start + size, :, :length] for value in self.known]
        cache.layers[:] = map(_KeptLayer, first[::2], first[1::2])
        return cache
