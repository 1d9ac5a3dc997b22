"""What a DeepSpeed ZeRO optimiser holds: flat float32 parts of the parameters."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayestune.adapters import is_partitioned
from bayestune.errors import Refusal

_SUPPORTED = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer")
_GROUP_ATTRIBUTES = ("bit16_groups", "bf16_groups", "fp16_groups")


class Piece(NamedTuple):
    """This process's piece of a parameter, in a flat tensor that ZeRO's inner optimiser holds."""

    flat: Tensor
    start: int
    size: int

    @property
    def value(self) -> Tensor:
        """The piece itself, to be changed in place."""
        return self.flat.detach()[self.start : self.start + self.size]

    @property
    def gradient(self) -> Tensor | None:
        """Its gradient, unscaled and clipped, while the inner optimiser steps."""
        gradient = self.flat.grad
        return None if gradient is None else gradient[self.start : self.start + self.size]


def is_zero(optimizer: object) -> bool:
    """Whether an optimiser is DeepSpeed's wrapper around another one that steps on flat parts.

    DeepSpeed's plain optimisers, such as its Adam on the CPU, are not: they are torch optimisers.
    """
    is_deepspeeds = type(optimizer).__module__.startswith("deepspeed.")
    return is_deepspeeds and not isinstance(optimizer, torch.optim.Optimizer)


def groups_of(optimizer: Any) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
    """The parameter groups of an optimiser, each with the model's own parameters in it."""
    if not is_zero(optimizer):
        for group in optimizer.param_groups:
            yield group, group["params"]
        return
    _refuse_out_of_reach(optimizer)
    names = [name for name in _GROUP_ATTRIBUTES if hasattr(optimizer, name)]
    group_ids = getattr(optimizer, "sub_group_to_group_id", None)  # of ZeRO-3
    for number, parameters in enumerate(getattr(optimizer, names[0])):
        group_id = number if group_ids is None else group_ids[number]
        yield optimizer.param_groups[group_id], list(parameters)


def _refuse_out_of_reach(optimizer: Any) -> None:
    """Refuses DeepSpeed optimisers whose float32 copies cannot be reached."""
    if getattr(optimizer, "swap_optimizer", False):
        raise Refusal(
            "the KL step does not reach parameters on a disk: got ZeRO's offload_optimizer with "
            'device "nvme", expected "cpu" or none; change the DeepSpeed configuration'
        )
    kind = type(optimizer).__name__
    if kind not in _SUPPORTED:
        raise Refusal(
            f"the KL step does not know the float32 copies of DeepSpeed's {kind}: expected those "
            "of ZeRO 1, 2 or 3; set zero_optimization.stage, and bf16 instead of fp16"
        )


def piece_of(parameter: Any, optimizer: Any) -> Piece | None:
    """This process's piece of a parameter, if the inner optimiser steps on it in this call."""
    if is_partitioned(parameter):
        group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        rank = torch.distributed.get_rank(parameter.ds_process_group)
        size = min(size, max(0, parameter.ds_numel - rank * size))  # without the padding
    else:
        mapping = parameter._hp_mapping
        if mapping is None:  # other processes have all of it
            return None
        flat = _flat_of(mapping.hp_fragment, optimizer)
        start, size = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
    steps_on_it = any(flat is held for held in _held_by_inner(optimizer))
    return Piece(flat, start, size) if steps_on_it and size else None


def _flat_of(fragment: Tensor, optimizer: Any) -> Any:
    """The flat tensor that the inner optimiser holds and a fragment is a view of, or None."""
    address = fragment.untyped_storage().data_ptr()
    for flat in _held_by_inner(optimizer):
        if flat.untyped_storage().data_ptr() == address:
            return flat
    return None


def _held_by_inner(optimizer: Any) -> Iterator[Tensor]:
    """The flat tensors in the groups of the inner optimiser."""
    for group in optimizer.optimizer.param_groups:
        yield from group["params"]
