"""Steps on bfloat16 and float16 parameters that are smaller than their last digit."""

import torch
from torch import Tensor, nn

LOW = (torch.bfloat16, torch.float16)


class Remainders:
    """Keeps in float32 what low-precision parameters cannot hold, so that small steps add up.

    The value of a parameter is itself plus its remainder, which is below half of its last digit. An
    optimiser that holds a float32 copy of its own (in its state, equal to the parameter once cast)
    would undo a step on the parameter: then the copy is the value.

    Args:
        optimizer: whose state may hold such copies.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._kept: dict[nn.Parameter, Tensor] = {}
        self._copies: dict[nn.Parameter, str | None] = {}

    def value(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's value in float32; the parameter itself if it is as precise as that."""
        if parameter.dtype not in LOW:
            return parameter.detach()
        if parameter not in self._copies:
            self._copies[parameter] = self._name_of_copy(parameter)
        name = self._copies[parameter]
        if name is not None:
            return self._optimizer.state[parameter][name]
        value = parameter.detach().float()
        kept = self._kept.get(parameter)
        return value if kept is None else value.add_(kept)

    def put(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Sets a parameter to a value, which `value` gave and which was changed in place."""
        if parameter.dtype not in LOW:
            return
        parameter.detach().copy_(value)
        if self._copies[parameter] is None:
            self._kept[parameter] = value - parameter.detach().float()

    def _name_of_copy(self, parameter: nn.Parameter) -> str | None:
        for name, held in self._optimizer.state.get(parameter, {}).items():
            alike = isinstance(held, Tensor) and held.shape == parameter.shape
            copies = alike and held.dtype is torch.float32 and bool(held.any())
            if copies and torch.equal(held.to(parameter.dtype), parameter.detach()):
                return name
        return None
