"""S fixed weights applied to S·N rows in one batched product."""

from typing import Self

import torch
from torch import Tensor, nn

from bayestune.errors import Refusal


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The type of a product with this weight: autocast's where it is on, else the weight's."""
    device = weight.device.type
    autocast = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else weight.dtype


class DrawnLinear(nn.Module):
    """S fixed weights (S, r, k) in a slot of LoRA; the rows come draw by draw.

    Example:
        >>> layer = DrawnLinear(torch.stack([torch.zeros(4, 16), torch.ones(4, 16)]))
        >>> layer(torch.ones(6, 3, 16))[:, 0, 0].tolist()
        [0.0, 0.0, 0.0, 16.0, 16.0, 16.0]
    """

    weight: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weights, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Maps (S·N, …, k) to (S·N, …, r); refuses a leading axis that S does not divide."""
        draws, rank, width = self.weight.shape
        if input.shape[0] % draws:
            raise Refusal(
                f"the rows do not divide into draws: got {input.shape[0]} rows, expected a "
                f"multiple of {draws}; repeat the batch once for each draw"
            )
        output = torch.bmm(input.reshape(draws, -1, width), self.weight.transpose(1, 2))
        return output.view(*input.shape[:-1], rank)

    @classmethod
    def of(cls, weights: Tensor, like: Tensor) -> Self:
        """The stack for the slot of the weight `like`: on its device, in the type of its product.

        PEFT casts a slot's input to the type of the slot's weight, so under autocast a float32
        stack would have the activations copied to float32 and back.
        """
        return cls(weights.to(like.device, compute_dtype(like)))
