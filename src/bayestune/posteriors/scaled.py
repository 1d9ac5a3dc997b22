"""A multiplied by random factors: of its columns (MC dropout) or ranks (DALorRA, ScalaBL)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from bayestune.adapters import Slots, held_noise, split_name
from bayestune.posteriors.posterior import AdapterPosterior, Saved, State

Law = Literal["bernoulli", "normal"]


@dataclass
class Scaled(AdapterPosterior):
    """Noise shared along a row or a column of A: factors (1, k) for its columns or (r, 1) for its
    ranks.

    "bernoulli": A_s = M ∘ 1[u_s < p]/p, whose mean is M: a column or a rank is kept with
    probability p. "normal": A_s = M + D ∘ (σ ε_s), D the direction that the noise scales, M itself
    unless given.

    Args:
        factors: p or σ for each slot name, (1, k) or (r, 1).
        law: "bernoulli" or "normal".
        directions: D by slot name, (r, k).
    """

    kind: ClassVar[str] = "scaled"
    factors: Mapping[str, Tensor]
    law: Law = "bernoulli"
    directions: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """One held draw of A."""
        weights = self.slots.weights()
        return {
            name: self._drawn_weight(weights[name].float().cpu(), name, index, seed)
            for name in self.factors
        }

    def _drawn_weight(self, mean: Tensor, name: str, index: int, seed: int) -> Tensor:
        factor = self.factors[name].float().cpu()
        noise = held_noise(factor.shape, seed, index, name)
        if self.law == "normal":
            return mean + self.directions.get(name, mean).float().cpu() * (factor * noise)
        kept = torch.special.ndtr(noise.double()) < factor
        return mean * (kept / factor)

    def state(self) -> State:
        """The factors' parameters and the directions by slot name, and the law."""
        tensors = {f"{name}.factor": value for name, value in self.factors.items()}
        tensors |= {f"{name}.direction": value for name, value in self.directions.items()}
        return tensors, {"law": self.law}

    @classmethod
    def restore(cls, saved: Saved) -> Self:
        """The posterior of `state`."""
        shapes = Slots(saved.model, saved.adapter).shapes()
        parts: dict[str, dict[str, Tensor]] = {"factor": {}, "direction": {}}
        for name, value in saved.tensors.items():
            slot, part = split_name(name)
            shape = shapes.get(slot, (-1, -1))
            if any(size not in (1, whole) for size, whole in zip(value.shape, shape, strict=True)):
                raise ValueError(
                    f"of another model or rank: got {name} of shape {tuple(value.shape)}, expected "
                    f"{shape} or 1"
                )
            parts[part][slot] = value
        return cls(
            saved.model,
            saved.scorer,
            parts["factor"],
            saved.facts["law"],
            parts["direction"],
            adapter=saved.adapter,
        )
