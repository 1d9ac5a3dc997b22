"""A multiplied by random factors: dropped columns (MC dropout), dropped ranks (DALorRA), Gaussian ranks (ScalaBL)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from bayestune.adapters import ADAPTER, held_noise, slots
from bayestune.forward import Batch, ClassLogits, DrawCache, Draws, drawn_logits
from bayestune.posteriors.posterior import Saved, State

Law = Literal["bernoulli", "normal"]


@dataclass
class Scaled:
    """Noise shared along a row or a column of A: factors of shape (1, k) for its columns or (r, 1) for its ranks.

    "bernoulli": A_s = M ∘ 1[u_s < p]/p, whose mean is M: a column or a rank is kept with probability p.
    "normal": A_s = M + D ∘ (σ ε_s), D the direction that the noise scales, M itself unless given.

    Args:
        model: a PEFT model whose slots hold the mean adapter.
        score: maps (model, batch) to class logits (N, C).
        factors: p or σ for each slot name, (1, k) or (r, 1).
        law: "bernoulli" or "normal".
        directions: D by slot name, (r, k).
        fitted: what the fit reports.
        adapter: which adapter.
    """

    kind: ClassVar[str] = "scaled"
    model: nn.Module
    score: ClassLogits
    factors: Mapping[str, Tensor]
    law: Law = "bernoulli"
    directions: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    fitted: Mapping[str, Any] = field(default_factory=dict, repr=False)
    adapter: str = ADAPTER
    has_mean: bool = field(default=True, init=False)
    atoms: int | None = field(default=None, init=False)
    _held: DrawCache = field(default_factory=DrawCache, init=False, repr=False)

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """One held draw of A by slot name, (r, k), float32 on the CPU."""
        present = slots(self.model, self.adapter)
        return {
            name: self._drawn(
                present[name].get_parameter("weight").detach().float().cpu(), name, index, seed
            )
            for name in self.factors
        }

    def _drawn(self, mean: Tensor, name: str, index: int, seed: int) -> Tensor:
        factor = self.factors[name].float().cpu()
        noise = held_noise(factor.shape, seed, index, name)
        if self.law == "normal":
            return mean + self.directions.get(name, mean).float().cpu() * (factor * noise)
        kept = torch.special.ndtr(noise.double()) < factor
        return mean * (kept / factor)

    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """The draws' logits (S, N, C), see `drawn_logits`; (1, N, C) for the mean."""
        return drawn_logits(self, inputs, draws, self._held)

    def state(self) -> State:
        """The factors' parameters and the directions by slot name, and the law."""
        tensors = {f"{name}.factor": value for name, value in self.factors.items()}
        return tensors | {f"{name}.direction": value for name, value in self.directions.items()}, {
            "law": self.law
        }

    @classmethod
    def restore(cls, saved: Saved) -> Self:
        """The posterior of `state`.

        Raises:
            ValueError: if a factor is not of one of the model's slots or does not fit it.
        """
        present = slots(saved.model, saved.adapter)
        parts: dict[str, dict[str, Tensor]] = {"factor": {}, "direction": {}}
        for name, value in saved.tensors.items():
            slot, _, part = name.rpartition(".")
            shape = (
                present[slot].get_parameter("weight").shape
                if slot in present
                else torch.Size([-1, -1])
            )
            if any(size not in (1, whole) for size, whole in zip(value.shape, shape, strict=True)):
                raise ValueError(
                    f"of another model or rank: got {name} of shape {tuple(value.shape)}, expected {tuple(shape)} or 1"
                )
            parts[part][slot] = value
        law, directions = saved.facts["law"], parts["direction"]
        return cls(
            saved.model, saved.score, parts["factor"], law, directions, adapter=saved.adapter
        )
