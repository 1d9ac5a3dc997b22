"""A Gaussian with a low-rank plus diagonal covariance over all slots at once: what SWAG returns."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from bayestune.adapters import held_noise
from bayestune.posteriors.posterior import AdapterPosterior, Saved, State, check_shapes


@dataclass
class LowRank(AdapterPosterior):
    """θ_s = θ̄ + √(v/2) ∘ ε_s + D z_s / √(2(K − 1)); the slots hold θ̄, and all share z_s (K,).

    Args:
        variances: v by slot name, the slot's shape, not negative.
        deviations: D by slot name, (K, *the slot's shape), K ≥ 2.

    Reference:
        Maddox, Garipov, Izmailov, Vetrov, Wilson: SWAG (equation 1), NeurIPS 2019,
        https://arxiv.org/abs/1902.02476.
    """

    kind: ClassVar[str] = "low_rank"
    variances: Mapping[str, Tensor]
    deviations: Mapping[str, Tensor]

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """One held draw of every slot."""
        means = self.slots.weights()
        weights = {}
        for name, deviations in self.deviations.items():
            mean = means[name].float().cpu()
            rank = len(deviations)
            z = held_noise((rank,), seed, index, "low rank")  # the same for all slots
            low_rank = torch.tensordot(z, deviations.float().cpu(), 1)
            std = (self.variances[name].float().cpu() / 2).sqrt()
            diagonal = std * held_noise(mean.shape, seed, index, name)
            weights[name] = mean + diagonal + low_rank / math.sqrt(2 * (rank - 1))
        return weights

    def state(self) -> State:
        """Variances and deviations by slot name."""
        tensors = {f"{name}.variance": value for name, value in self.variances.items()}
        tensors |= {f"{name}.deviations": value for name, value in self.deviations.items()}
        return tensors, {}

    @classmethod
    def restore(cls, saved: Saved) -> Self:
        """The posterior of a saved `state`."""
        parts = saved.parts()
        variances = parts["variance"]
        deviations = parts["deviations"]
        check_shapes(variances, saved.shapes)
        check_shapes({name: value[0] for name, value in deviations.items()}, saved.shapes)
        return cls(saved.model, saved.scorer, variances, deviations, adapter=saved.adapter)
