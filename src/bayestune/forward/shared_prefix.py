"""Shared-prefix draws, an approximation: the mean reads all but the end of the prompt."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from bayestune.adapters import Arrivals, Slots, base_of
from bayestune.errors import Refusal
from bayestune.forward.draws import Chunk
from bayestune.forward.kept_tokens import cache_argument


class SharedPrefix(nn.Module):
    """Stands in for a PEFT model whose draws share the mean's reading of the prompt's first part.

    A pass over S·N rows of T tokens becomes two. The mean adapter reads the prefix of the N rows
    once; its keys and values serve all S draws, which then read the last m tokens of the prompt and
    the u tokens scored behind it. The cost is about 1 + (S − 1)·(m + u)/T passes of the mean
    instead of S. It is not the posterior's predictive, for the noise of the prefix is left out; it
    is exact without noise, and where m is as long as the prompt.

    Args:
        slots: of a causal PEFT model in evaluation mode, where the draws stand.
        length: m, at least 1.

    Raises:
        Refusal: if m is not positive, or the model keeps no keys and values of what it has read.
    """

    def __init__(self, slots: Slots, length: int) -> None:
        super().__init__()
        if length < 1:
            raise Refusal(
                f"shared_prefix must leave the draws one token or more: got {length}; 16 is usual"
            )
        base = base_of(slots.model)
        cache = cache_argument(base)
        if cache is None:
            raise Refusal(
                f"draws cannot share a prefix: got a {type(base).__name__}, expected a causal "
                "language model, which keeps the keys and values of what it has read; leave "
                "shared_prefix out"
            )
        self.model = slots.model
        self.slots = slots
        self.length = length
        self._cache = cache
        self._takes_keep = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._chunk = Chunk(0, 1, {})
        self._arrivals = Arrivals(1)
        self._read: DynamicCache | None = None

    def get_base_model(self) -> nn.Module:
        """The base model, as PEFT gives it."""
        return base_of(self.model)

    @property
    def way(self) -> str:
        """What the last pass shared."""
        return "mean's prefix"

    @contextmanager
    def computing(self, chunk: Chunk, arrivals: Arrivals) -> Iterator[nn.Module]:
        """A context for a pass over S·N rows under some of the draws; gives this module itself."""
        self._chunk = chunk
        self._arrivals = arrivals
        yield self

    def forward(
        self, input_ids: Tensor, logits_to_keep: int = 1, use_cache: bool = False, **rest: Any
    ) -> Any:
        """The model's output at the end of S·N rows, the logits of their last positions.

        Args:
            input_ids: (S·N, T), the same N rows S times, which end together (padded on the left).
            logits_to_keep: u + 1, the positions whose logits are asked for.
            use_cache: has no effect.
            rest: attention_mask (S·N, T) or (S·N, 1, T, T), position_ids (S·N, T), and what else
                the model takes.
        """
        if not isinstance(logits_to_keep, int):
            raise Refusal(
                "draws cannot share a prefix of rows that end apart: got rows padded on the right, "
                "expected the left; set tokenizer.padding_side='left', or leave shared_prefix out"
            )
        split = input_ids.shape[1] - self.length - (logits_to_keep - 1)
        inputs = {"input_ids": input_ids}
        for name in ("attention_mask", "position_ids"):
            if rest.get(name) is not None:
                inputs[name] = rest.pop(name)
        if self._takes_keep:
            rest["logits_to_keep"] = logits_to_keep
        if split > 0:
            rest[self._cache] = self._prefix_cache(inputs, split, **rest)
            inputs = {name: _end(name, value, split) for name, value in inputs.items()}
        with self.slots.holding(self._chunk.stacks, self._arrivals):
            return self.model(**inputs, use_cache=split > 0, **rest)

    def _prefix_cache(self, inputs: Mapping[str, Tensor], split: int, **rest: Any) -> DynamicCache:
        """Keys and values of the prefix for all S·N rows; a batch's first pass reads them for N."""
        num_rows = len(inputs["input_ids"]) // self._chunk.size
        if self._read is None:
            start = {name: _start(value[:num_rows], split) for name, value in inputs.items()}
            if self._takes_keep:
                rest["logits_to_keep"] = 1
            output = self.model(**start, use_cache=True, **rest)
            self._read = _checked(getattr(output, self._cache), type(base_of(self.model)).__name__)
        repeated = copy.copy(self._read)
        # shallow copies are enough: a layer grows by making new tensors, so those read stay
        repeated.layers = [copy.copy(layer) for layer in repeated.layers]
        rows = torch.arange(num_rows, device=inputs["input_ids"].device)
        repeated.batch_select_indices(rows.repeat(self._chunk.size))
        return repeated


def _checked(cache: Any, model: str) -> DynamicCache:
    """A cache with keys and values of each token in every layer; others are refused."""
    layers = getattr(cache, "layers", [])
    if not layers or not all(isinstance(layer, DynamicLayer) for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers}) or [type(cache).__name__]
        raise Refusal(
            f"draws cannot share a prefix: got a {model} that remembers in {kinds}, expected keys "
            "and values of each token in every layer; leave shared_prefix out"
        )
    return cache


def _start(value: Tensor, split: int) -> Tensor:
    """Ids, positions or mask of the prefix."""
    return value[:, :, :split, :split] if value.dim() == 4 else value[:, :split]


def _end(name: str, value: Tensor, split: int) -> Tensor:
    """Ids and positions of the last tokens; of the mask, which of all tokens these may see."""
    if name == "attention_mask":
        return value[:, :, split:] if value.dim() == 4 else value
    return value[:, split:]
