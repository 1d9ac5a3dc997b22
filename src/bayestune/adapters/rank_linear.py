"""Random factors on the ranks of LoRA's A: the layer that ScalaBL and DALorRA share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from bayestune.adapters.entrances import passes_of, put_row_axes
from bayestune.adapters.slots import Slots
from bayestune.adapters.training_passes import TrainingPasses


class RankLinear(nn.Linear, ABC):
    """x ↦ z ∘ (W x), W (r, k) the `weight`, z (r,) a random factor for each rank.

    In training mode each row of a pass has a z of its own, from torch's global generator; in
    evaluation mode z is its mean. W is the plain layer's, the same Parameter; a model's layers
    share their `TrainingPasses`.
    """

    def __init__(self, linear: nn.Linear, passes: TrainingPasses | None = None) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.passes = passes if passes is not None else TrainingPasses()
        self.row_axis: int | None = 0
        self.train(linear.training)

    @property
    @abstractmethod
    def mean_factors(self) -> Tensor:
        """E[z] (r,)."""

    @abstractmethod
    def noise(self, num_rows: int) -> Tensor:
        """The noise of each row, (N, r), from torch's global generator."""

    @abstractmethod
    def factors(self, noise: Tensor) -> Tensor:
        """One z for each row, (N, r), from its noise, differentiable."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (rows, …, k) to (rows, …, r)."""
        output = F.linear(input, self.weight)
        if not self.training or self.passes.are_at_mean():
            return output * self.mean_factors.to(output.dtype)
        call = self.passes.call(self, output, self.row_axis, self.noise)
        factors = self.factors(call.of_blocks(call.noise)).to(output.dtype)
        return call.shaped(call.blocks * factors[:, None])


Layer = TypeVar("Layer", bound=RankLinear)


def make_ranks_random(
    model: nn.Module, make: Callable[[nn.Linear, TrainingPasses], Layer]
) -> dict[str, Layer]:
    """Replaces each A by a random layer; all are checked before the first is replaced.

    Args:
        model: a PEFT model.
        make: makes a layer from the plain one and the model's passes.

    Returns:
        The new layers by slot name.
    """
    slots = Slots(model)
    plain = slots.replaceable()
    passes = passes_of(model)
    layers = {name: make(slot, passes) for name, slot in plain.items()}
    put_row_axes(model, layers)
    slots.put(layers)
    return layers


def put_means(model: nn.Module, layers: Mapping[str, RankLinear]) -> None:
    """Replaces each layer, given by slot name, by a plain one with the weight E[z] ∘ W."""
    plain = {}
    for name, layer in layers.items():
        weight = (layer.mean_factors[:, None] * layer.weight).detach()
        plain[name] = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain[name].weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        plain[name].train(layer.training)
    Slots(model).put(plain)
