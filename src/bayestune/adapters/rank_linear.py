"""Random factors on the ranks of LoRA's A: the layer that ScalaBL and DALorRA share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from bayestune.adapters.row_groups import RowGroups, row_groups_of
from bayestune.adapters.slots import Slots


class RankLinear(nn.Linear, ABC):
    """x ↦ z ∘ (W x), W (r, k) the `weight`, z (r,) a random factor for each rank.

    In training mode each row of the batch has a z of its own, from torch's global generator; in
    evaluation mode z is its mean. W is the plain layer's, the same Parameter; a model's layers
    share their `RowGroups`.
    """

    def __init__(self, linear: nn.Linear, groups: RowGroups | None = None) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.groups = groups if groups is not None else RowGroups()
        self.train(linear.training)

    @property
    @abstractmethod
    def mean_factors(self) -> Tensor:
        """E[z] (r,)."""

    @abstractmethod
    def factors(self, num_rows: int) -> Tensor:
        """One z for each row, (N, r), differentiable."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (rows, …, k) to (rows, …, r)."""
        output = F.linear(input, self.weight)
        if not self.training:
            return output * self.mean_factors.to(output.dtype)
        rows = self.groups.rows(input.shape[0])
        factors = self.factors(rows).to(output.dtype)
        return (output.reshape(rows, -1, self.out_features) * factors[:, None]).view_as(output)


Layer = TypeVar("Layer", bound=RankLinear)


def make_ranks_random(
    model: nn.Module, make: Callable[[nn.Linear, RowGroups], Layer]
) -> dict[str, Layer]:
    """Replaces each A by a layer that `make` builds from the plain one and the model's row groups.

    All of them are checked before the first is replaced. Returns the layers by slot name.
    """
    slots = Slots(model)
    plain = slots.replaceable()
    groups = row_groups_of(model)
    layers = {name: make(slot, groups) for name, slot in plain.items()}
    slots.put(layers)
    return layers


def put_means(model: nn.Module, layers: Mapping[str, RankLinear]) -> None:
    """Puts a plain layer with the weight E[z] ∘ W in the slot of each layer."""
    plain = {}
    for name, layer in layers.items():
        weight = (layer.mean_factors[:, None] * layer.weight).detach()
        plain[name] = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain[name].weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        plain[name].train(layer.training)
    Slots(model).put(plain)
