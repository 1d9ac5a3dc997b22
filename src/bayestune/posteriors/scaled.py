"""A multiplied by random factors: of its columns (MC dropout) or ranks (DALorRA, ScalaBL)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from bayestune.adapters import held_noise, split_name
from bayestune.errors import Refusal
from bayestune.posteriors.posterior import AdapterPosterior, Saved, State

Law = Literal["bernoulli", "normal"]


@dataclass
class Scaled(AdapterPosterior):
    """A with random factors: (1, k) of its columns, or (r, 1) of its rows, the ranks.

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
        means = self.slots.weights()
        weights = {}
        for name, value in self.factors.items():
            mean = means[name].float().cpu()
            factor = value.float().cpu()
            noise = held_noise(factor.shape, seed, index, name)
            if self.law == "normal":
                direction = self.directions.get(name, mean).float().cpu()
                weights[name] = mean + direction * (factor * noise)
            else:
                kept = torch.special.ndtr(noise.double()) < factor
                weights[name] = mean * (kept / factor)
        return weights

    def state(self) -> State:
        """The factors' parameters and the directions by slot name, and the law."""
        tensors = {f"{name}.factor": value for name, value in self.factors.items()}
        tensors |= {f"{name}.direction": value for name, value in self.directions.items()}
        return tensors, {"law": self.law}

    @classmethod
    def restore(cls, saved: Saved) -> Self:
        """The posterior of a saved `state`."""
        shapes = saved.shapes
        if not saved.tensors:
            raise Refusal("of another model or rank: got no factors, expected some; fit it again")
        for name, value in saved.tensors.items():
            shape = shapes.get(split_name(name)[0], (-1, -1))
            if any(size not in (1, whole) for size, whole in zip(value.shape, shape, strict=True)):
                raise Refusal(
                    f"of another model or rank: got {name} of shape {tuple(value.shape)}, expected "
                    f"{shape} or 1"
                )
        parts = saved.parts()
        return cls(
            saved.model,
            saved.scorer,
            parts["factor"],
            saved.facts["law"],
            parts["direction"],
            adapter=saved.adapter,
        )
