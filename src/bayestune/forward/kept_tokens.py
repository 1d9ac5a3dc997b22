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
_CHANGING_ROPE = ("dynamic", "longrope")  # a token's rotation depends on the sequence's length
_ENCODER_LIKE = ("is_encoder_decoder", "use_bidirectional_attention")
_KNOWN_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers")
_BY_MORE_THAN_POSITION = ("alibi", "num_kv_shared_layers", *_ENCODER_LIKE)


def cache_argument(base: nn.Module) -> str | None:
    """The argument and output by which a model passes on keys and values; None if it keeps none."""
    if is_classifier(base):
        return None
    accepted = inspect.signature(base.forward).parameters  # type: ignore[arg-type]
    return next((name for name in _CACHE if name in accepted), None)


def has_own_window(config: Any) -> bool:
    """Whether attention sees only a window of columns, of which caches and masks say nothing.

    GPT-Neo's local layers do, and so does any model whose settings name a window other than the
    usual sliding one.
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


def is_plain(cache: Any, size: int, length: int) -> bool:
    """Whether a cache holds keys and values of each of (size, length) tokens, and nothing else."""
    if type(cache) is not DynamicCache or not cache.layers:
        return False
    layers: list[Any] = cache.layers
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
    """Kept (S, heads, c, width), repeated for N rows, before own (S·N, heads, …, width)."""
    own = own.unflatten(0, (len(kept), -1))
    kept = kept[:, None].expand(-1, own.shape[1], -1, -1, -1)
    return torch.cat([kept, own], -2).flatten(0, 1)


@dataclass
class KeptTokens:
    """Tokens and their keys and values under S draws.

    Args:
        tokens: ids and positions (2, c).
        done: for each draw, whether its keys and values are there.
        states: each layer's keys, then its values, (S, heads, c, width).
    """

    tokens: Tensor
    done: list[bool]
    states: list[Tensor] = field(default_factory=list)

    def put(self, start: int, states: list[Tensor]) -> None:
        """Takes in the keys and values of the draws from `start` on."""
        num_draws = len(states[0])
        part = slice(start, start + num_draws)
        first = [state[:, :, : self.tokens.shape[1]] for state in states]
        if not self.states:
            self.states = [state.new_empty(len(self.done), *state.shape[1:]) for state in first]
        for of_all, state in zip(self.states, first, strict=True):
            of_all[part] = state
        self.done[part] = [True] * num_draws

    def cache(self, start: int, size: int, length: int) -> DynamicCache:
        """The first `length` tokens of `size` draws from `start` on, as a model takes them."""
        cache = DynamicCache()
        first = [state[start : start + size, :, :length] for state in self.states]
        cache.layers[:] = map(_KeptLayer, first[::2], first[1::2])
        return cache
