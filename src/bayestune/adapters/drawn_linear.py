"""S fixed weights applied to S·N rows in one batched product."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayestune.adapters.arrivals import Arrivals
from bayestune.adapters.spread import shape_of
from bayestune.errors import Refusal


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The type of a product with this weight: autocast's where it is on, else the weight's."""
    device = weight.device.type
    autocast = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else weight.dtype


class DrawnLinear(nn.Module):
    """S fixed weights (S, r, k) in a slot of LoRA; the rows come draw by draw.

    A single weight is a plain linear map, whatever the axes before the last one are.

    Args:
        weights: (S, r, k), or (S, d, r) for B.
        name: the slot's.
        arrivals: notes of the pass, where each call is entered; None for notes of its own.
        bias: of the slot (`lora_bias`), which all draws share.

    Example:
        >>> layer = DrawnLinear(torch.stack([torch.zeros(4, 16), torch.ones(4, 16)]))
        >>> layer(torch.ones(6, 3, 16))[:, 0, 0].tolist()
        [0.0, 0.0, 0.0, 16.0, 16.0, 16.0]
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weights: Tensor,
        name: str = "",
        arrivals: Arrivals | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weights, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.name = name
        self.arrivals = arrivals if arrivals is not None else Arrivals(len(weights))

    def forward(self, input: Tensor) -> Tensor:
        """Maps (S·N, …, k) to (S·N, …, r).

        Raises:
            Refusal: if the leading axis cannot be the rows of the pass, draw by draw.
        """
        draws, rank, width = self.weight.shape
        self.arrivals.take(self.name, input.shape[0])
        if draws == 1:
            return F.linear(input, self.weight[0], self.bias)
        output = torch.bmm(input.reshape(draws, -1, width), self.weight.transpose(1, 2))
        if self.bias is not None:
            output += self.bias
        return output.view(*input.shape[:-1], rank)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Refuses in a slot: a state without its own weight would be saved as the adapter."""
        if self.name:
            raise Refusal(
                f"a model is not saved inside drawn(): got the state of {self.name}, which holds "
                "draws, expected the adapter's own; leave the context first, and take "
                "export_draw(posterior, index, folder) to write a draw"
            )

    def __deepcopy__(self, memo: Any) -> Self:
        """Refuses: the copy would have the draws for good."""
        raise Refusal(
            f"a model is not copied inside drawn(): got {self.name or 'a stack'}, which holds "
            "draws, expected the adapter's own weights; leave the context first"
        )

    @classmethod
    def of(cls, weights: Tensor, slot: nn.Module, name: str, arrivals: Arrivals) -> Self:
        """The stack for a slot that holds a module now: on its device, in the type of its product.

        PEFT casts a slot's input to the type of the slot's weight, so under autocast a float32
        stack would have the activations copied to float32 and back.
        """
        held: Any = slot  # not get_parameter: the weight of a `DrawnLinear` is a buffer
        dtype = compute_dtype(held.weight)
        bias = None if held.bias is None else held.bias.detach().to(dtype)
        return cls(weights.to(held.weight.device, dtype), name, arrivals, bias)


def refuse_other_shapes(
    stacks: Mapping[str, Tensor], slots: Mapping[str, nn.Module], draws: int
) -> None:
    """Refuses weights of draws, by slot name, that are not S of each slot's shape."""
    for name, stack in stacks.items():
        slot: Any = slots[name]
        expected = (draws, *shape_of(slot.weight)[-2:])
        if tuple(stack.shape) != expected:
            raise Refusal(
                f"draws do not fit their slot: got {tuple(stack.shape)} for {name}, expected "
                f"{expected}, S weights of the slot's shape; a single draw is weight[None]"
            )
