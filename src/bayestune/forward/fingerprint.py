"""Detects whether a model's weights or adapters changed, so that cached results can be reused."""

import secrets
from typing import Any

import torch
from torch import Tensor, nn

from bayestune.adapters import all_agree, part_here

_MARK = "_bayestune_mark"
_OF_PEFT = ("merged_adapters", "active_adapters", "disable_adapters", "scaling")


class Fingerprint:
    """A model's weights and the state of its adapters, to compare with later.

    Parameters that an optimiser may change, the adapters' and all that are trainable, are compared
    by value: fused optimisers and writes to `.data` leave no trace in a tensor's version. The
    frozen ones, by far the most, are compared by version, address and a mark that is put on them.
    The mark is needed because a tensor's id may be used again; a weak reference would not do,
    because a tensor with one cannot be moved in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self._facts, values = _state_of(model)
        self._values = torch.cat(values).clone() if values else torch.empty(0)

    def matches(self, model: nn.Module) -> bool:
        """Whether nothing has changed since, in any process that has a part of the model."""
        facts, values = _state_of(model)
        same = facts == self._facts
        if same and values:
            same = torch.equal(torch.cat(values), self._values)
        return all_agree(same, model)


def _state_of(model: nn.Module) -> tuple[list[Any], list[Tensor]]:
    """Facts, and values of the parameters that may change; both must be equal later."""
    facts: list[Any] = []
    changing: list[Tensor] = []
    for path, module in model.named_modules():
        if "merged_adapters" in vars(module):
            facts.append(str([getattr(module, name, None) for name in _OF_PEFT]))
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            facts.append((path, name, tensor.dtype, tensor.device, tensor.shape))
            if tensor.requires_grad or "lora_" in path or "modules_to_save" in path:
                changing.append(tensor)
            else:
                # a tensor made in inference mode has no version: take an object equal to no other
                version = object() if tensor.is_inference() else tensor._version
                plain = type(tensor) in (Tensor, nn.Parameter)  # others need not have an address
                facts.append((_mark_of(tensor), version, tensor.data_ptr() if plain else 0))
    first = changing[0].device if changing else None
    return facts, [part_here(tensor).detach().flatten().to(first) for tensor in changing]


def _mark_of(tensor: Tensor) -> int:
    """A random number kept on this tensor, which a tensor that replaces it does not have."""
    mark = getattr(tensor, _MARK, None)
    if mark is None:
        mark = secrets.randbits(62)
        setattr(tensor, _MARK, mark)
    return mark
