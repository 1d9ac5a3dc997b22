"""Parameters that are spread over processes, by FSDP2 or DeepSpeed's ZeRO-3: read and set whole.

What is read or set here is read or set by all processes at once, in the same order.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from bayestune.adapters.wrapped import unwrapped

_OF_ADAPTERS = ("lora_", "modules_to_save", "trainable_tokens")


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has a parameter in parts, so that the tensor itself may be empty."""
    return hasattr(tensor, "ds_id")


def is_spread(model: nn.Module) -> bool:
    """Whether a pass of the model needs all processes, because they have parts of its weights."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    parameters = unwrapped(model).parameters()
    return any(isinstance(one, DTensor) or is_partitioned(one) for one in parameters)


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the whole."""
    return torch.Size(tensor.ds_shape) if is_partitioned(tensor) else tensor.shape  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts; itself if it has none."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if is_partitioned(tensor):
        with _gathered([tensor]):
            return tensor.detach().clone()
    return tensor


@torch.no_grad()
def put_whole(parameter: Tensor, value: Tensor) -> None:
    """Sets a parameter to a value, each process its part."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
    elif is_partitioned(parameter):
        with _gathered([parameter], modifier_rank=0):
            parameter.copy_(value)
    else:
        parameter.copy_(value)


def _gathered(parameters: Iterable[Tensor], modifier_rank: int | None = None) -> Any:
    # what partitioned the parameters has imported deepspeed
    zero: Any = sys.modules["deepspeed"].zero
    return zero.GatheredParameters(list(parameters), modifier_rank=modifier_rank)


def part_here(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; itself if it has none."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor.ds_tensor if is_partitioned(tensor) else tensor  # type: ignore[attr-defined]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's state, in which the adapters and all that is trained are whole.

    Of a spread model, the other tensors are as they are in this process, in parts.
    """
    if not is_spread(model):
        return model.state_dict()
    state: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    gathered = {}
    for name, value in state.items():
        is_trained = value.requires_grad or any(part in name for part in _OF_ADAPTERS)
        gathered[name] = whole(value).detach() if is_trained else value
    return gathered


def all_agree(vote: bool, model: nn.Module) -> bool:
    """Whether all processes that have parts of a model vote for something.

    Args:
        vote: of this process, the only one that counts if the model is not spread.
        model: all processes that have a part of it must call this.
    """
    if not is_spread(model):
        return vote
    return no_other(vote, next(unwrapped(model).parameters()).device)


def no_other(vote: bool, device: torch.device) -> bool:
    """Whether all processes vote for something; all of them must call this.

    Args:
        vote: of this process.
        device: on which the processes communicate.
    """
    votes = torch.tensor(float(vote), device=device)
    distributed.all_reduce(votes, distributed.ReduceOp.MIN)
    return bool(votes)
