"""Shared-prefix draws, an approximation: all but the end of the prompt is read once, by the mean adapter."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from bayestune.adapters import ADAPTER, base_of, drawn
from bayestune.forward.common_prefix import cache_argument


class SharedPrefix(nn.Module):
    """Stands for a PEFT model whose draws share what they know of the first part of a prompt.

    A pass over S·N rows of T tokens becomes two. The mean adapter reads the prefix of the N rows once; its keys and
    values serve all S draws. The draws then read the last m tokens of the prompt, and what is scored behind it. With u
    tokens scored behind the prompt the cost is about 1 + (S − 1)·(m + u)/T passes of the mean instead of S. It is not
    the posterior's predictive: the noise of the prefix is left out. Two cases are exact: no noise at all, and m as
    long as the prompt.

    Args:
        model: a causal PEFT model in evaluation mode.
        length: m, at least 1.
        adapter: which adapter is drawn.

    Raises:
        ValueError: if m is not positive, or the model keeps no keys and values of what it has read.
    """

    def __init__(self, model: nn.Module, length: int, adapter: str = ADAPTER) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(
                f"shared_prefix must leave the draws one token or more: got {length}; 16 is usual"
            )
        base = base_of(model)
        accepted = inspect.signature(base.forward).parameters  # type: ignore[arg-type]
        if (cache := cache_argument(base)) is None:
            raise ValueError(
                f"draws cannot share a prefix: got a {type(base).__name__}, expected a causal language model, which "
                "keeps the keys and values of what it has read; leave shared_prefix out"
            )
        self.model, self.length, self.adapter = model, length, adapter
        self._cache, self._takes_keep = cache, "logits_to_keep" in accepted
        self._weights: Mapping[str, Tensor] = {}
        self._times = 1
        self._read: DynamicCache | None = None

    def get_base_model(self) -> nn.Module:
        """The base model, as PEFT gives it."""
        return self.model.get_base_model()  # type: ignore[operator]

    @contextmanager
    def drawing(self, weights: Mapping[str, Tensor], times: int) -> Iterator[None]:
        """The draws of the passes inside: stacks (S, …) by slot name, and S."""
        self._weights, self._times = weights, times
        yield
        self._weights = {}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int = 1,
        use_cache: bool = False,
        **rest: Any,
    ) -> Any:
        """The model's output at the end of S·N rows, draw by draw; its logits are those of the last positions only.

        Args:
            input_ids: (S·N, T), the same N rows S times, which end together (padded on the left).
            attention_mask: (S·N, T) or (S·N, 1, T, T).
            position_ids: (S·N, T).
            logits_to_keep: u + 1, the positions whose logits are asked for.
            use_cache: not heeded.
            rest: handed on.
        """
        split = input_ids.shape[1] - self.length - (logits_to_keep - 1)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if self._takes_keep:
            rest["logits_to_keep"] = logits_to_keep
        if split <= 0:
            with drawn(self.model, self._weights, self.adapter):
                return self.model(**inputs, use_cache=False, **rest)
        known = self._known(inputs, split, rest)
        end = {name: _end(name, value, split) for name, value in inputs.items()}
        with drawn(self.model, self._weights, self.adapter):
            return self.model(**end, **{self._cache: known}, use_cache=True, **rest)

    def _known(
        self, inputs: Mapping[str, Tensor], split: int, rest: Mapping[str, Any]
    ) -> DynamicCache:
        """Keys and values of the prefix for all draws' rows; read in the first pass of a batch, kept for the others."""
        num_rows = len(inputs["input_ids"]) // self._times
        if self._read is None:
            start = {name: _start(value[:num_rows], split) for name, value in inputs.items()}
            one = {"logits_to_keep": 1} if self._takes_keep else {}
            output = self.model(**start, use_cache=True, **{**rest, **one})
            self._read = self._checked(getattr(output, self._cache))
        known = copy.copy(self._read)
        known.layers = [
            copy.copy(layer) for layer in known.layers
        ]  # these grow by new tensors: what was read stays
        known.batch_select_indices(
            torch.arange(num_rows, device=inputs["input_ids"].device).repeat(self._times)
        )
        return known

    def _checked(self, read: Any) -> DynamicCache:
        layers = getattr(read, "layers", [])
        if not layers or not all(isinstance(layer, DynamicLayer) for layer in layers):
            kinds = sorted({type(layer).__name__ for layer in layers}) or [type(read).__name__]
            raise ValueError(
                f"draws cannot share a prefix: got a {type(self.get_base_model()).__name__} that remembers in {kinds}, "
                "expected keys and values of each token in every layer; leave shared_prefix out"
            )
        return read


def _start(value: Tensor, split: int) -> Tensor:
    """Ids, positions or mask of the prefix."""
    return value[:, :, :split, :split] if value.dim() == 4 else value[:, :split]


def _end(name: str, value: Tensor, split: int) -> Tensor:
    """Ids and positions of the last tokens; of the mask, what these may see of all."""
    if name == "attention_mask":
        return value[:, :, split:] if value.dim() == 4 else value
    return value[:, split:]
