"""A Gaussian with a low-rank plus diagonal covariance over all slots at once: what SWAG returns."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bayestune.adapters import ADAPTER, held_noise, slots
from bayestune.forward import Batch, ClassLogits, DrawCache, Draws, drawn_logits
from bayestune.posteriors.posterior import Saved, State, check_shapes


@dataclass
class LowRank:
    """θ_s = θ̄ + √(v/2) ∘ ε_s + D z_s / √(2(K − 1)), z_s (K,) shared by all slots.

    Args:
        model: a PEFT model whose slots hold the mean θ̄.
        score: maps (model, batch) to class logits (N, C).
        variances: v by slot name, the slot's shape, not negative.
        deviations: D by slot name, (K, *the slot's shape), K ≥ 2.
        fitted: what the fit reports.
        adapter: which adapter.

    Reference:
        Maddox, Garipov, Izmailov, Vetrov, Wilson: SWAG, NeurIPS 2019, https://arxiv.org/abs/1902.02476, equation 1.
    """

    kind: ClassVar[str] = "low_rank"
    model: nn.Module
    score: ClassLogits
    variances: Mapping[str, Tensor]
    deviations: Mapping[str, Tensor]
    fitted: Mapping[str, Any] = field(default_factory=dict, repr=False)
    adapter: str = ADAPTER
    has_mean: bool = field(default=True, init=False)
    atoms: int | None = field(default=None, init=False)
    _held: DrawCache = field(default_factory=DrawCache, init=False, repr=False)

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """One held draw of every slot by name, A (r, k) and B (d, r), float32 on the CPU."""
        present, weights = slots(self.model, self.adapter), {}
        for name, deviations in self.deviations.items():
            mean, count = (
                present[name].get_parameter("weight").detach().float().cpu(),
                len(deviations),
            )
            along = torch.tensordot(
                held_noise((count,), seed, index, "low rank"), deviations.float().cpu(), 1
            )
            own = (self.variances[name].float().cpu() / 2).sqrt() * held_noise(
                mean.shape, seed, index, name
            )
            weights[name] = mean + own + along / math.sqrt(2 * (count - 1))
        return weights

    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """The draws' logits (S, N, C), see `drawn_logits`; (1, N, C) for the mean."""
        return drawn_logits(self, inputs, draws, self._held)

    def state(self) -> State:
        """Variances and deviations by slot name."""
        tensors = {f"{name}.variance": value for name, value in self.variances.items()}
        return tensors | {
            f"{name}.deviations": value for name, value in self.deviations.items()
        }, {}

    @classmethod
    def restore(cls, saved: Saved) -> Self:
        """The posterior of `state`.

        Raises:
            ValueError: if the tensors are not of this model's slots or shapes.
        """

        def part(ending: str) -> dict[str, Tensor]:
            return {
                name.removesuffix(ending): value
                for name, value in saved.tensors.items()
                if name.endswith(ending)
            }

        variances, deviations = part(".variance"), part(".deviations")
        expected = {
            n: tuple(slot.get_parameter("weight").shape)
            for n, slot in slots(saved.model, saved.adapter).items()
        }
        check_shapes(variances, expected)
        check_shapes({name: value[0] for name, value in deviations.items()}, expected)
        return cls(saved.model, saved.score, variances, deviations, adapter=saved.adapter)
