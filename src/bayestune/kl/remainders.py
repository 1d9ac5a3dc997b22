"""Steps on bfloat16 and float16 parameters, which may be smaller than their last digit."""

import torch
from torch import Tensor, nn

_LOW_PRECISION = (torch.bfloat16, torch.float16)


class Remainders:
    """Keeps in float32 what low-precision parameters cannot hold, so that small steps add up.

    The value of a parameter is the parameter plus its remainder, which is below half of its last
    digit. Some optimisers hold a float32 copy of each parameter in their state, from which they
    would undo a step on the parameter alone: then the copy is the value.

    Args:
        optimizer: whose state may hold such copies, tensors equal to the parameter once cast.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._remainders: dict[nn.Parameter, Tensor] = {}
        self._copies: dict[nn.Parameter, str | None] = {}  # keys of the optimiser's state

    def value(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's value in float32; the parameter itself if it is as precise as that."""
        if parameter.dtype not in _LOW_PRECISION:
            return parameter.detach()
        if parameter not in self._copies:
            self._copies[parameter] = self._name_of_copy(parameter)
        name = self._copies[parameter]
        if name is not None:
            return self._optimizer.state[parameter][name]
        value = parameter.detach().float()
        remainder = self._remainders.get(parameter)
        return value if remainder is None else value.add_(remainder)

    def set_value(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Sets a parameter to what `value` returned for it, which has been changed in place."""
        if parameter.dtype not in _LOW_PRECISION:
            return
        parameter.detach().copy_(value)
        if self._copies[parameter] is None:
            self._remainders[parameter] = value - parameter.detach().float()

    def _name_of_copy(self, parameter: nn.Parameter) -> str | None:
        """The key under which the optimiser's state holds a float32 copy; None if it has none."""
        for name, entry in self._optimizer.state.get(parameter, {}).items():
            if not isinstance(entry, Tensor) or entry.shape != parameter.shape:
                continue
            may_be_copy = entry.dtype is torch.float32 and bool(entry.any())
            if may_be_copy and torch.equal(entry.to(parameter.dtype), parameter.detach()):
                return name
        return None
