"""Laplace posteriors over LoRA's matrices: predictions by linearising the logits, or by drawing adapters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bayestune.adapters import ADAPTER, adapter_weights, held_noise, replaceable_slots
from bayestune.curvature import Block, Diagonal, Kronecker, Trace, semidefinite_root, traced
from bayestune.forward import (
    Batch,
    ClassLogits,
    DrawCache,
    Draws,
    drawn_logits,
    mean_logits,
    on_device,
)
from bayestune.posteriors.posterior import Saved, State

_BLOCKS: dict[str, type[Any]] = {"kfac": Kronecker, "diagonal": Diagonal}
_NOISE = "laplace"  # the address of the logits' noise, which belongs to no slot


@dataclass
class Linearised:
    """q(θ) = N(θ_MAP, Σ), Σ = (H + λI)⁻¹ block by block, seen through the model's linearisation in θ at θ_MAP.

    The class logits of a row are then Gaussian: f ~ N(f_MAP, J·Σ·Jᵀ), J the Jacobian of its C logits with respect to
    the LoRA matrices that have a block. Draw s of row n is f_MAP + L_n·z_s with L_n·L_nᵀ = J_n·Σ·J_nᵀ, and z_s (C,)
    is the held noise with the address (seed, s, "laplace"). Each row has its exact law; how rows vary together is not
    kept, since all rows share z_s. A draw is no adapter, for that see `Sampled`.

    Args:
        model: a PEFT model that holds θ_MAP.
        score: maps (model, batch) to class logits (N, C).
        blocks: H of each LoRA matrix by slot name; the others are points.
        prior_precision: λ.
        fitted: what the fit reports.
        adapter: which adapter.
        max_rows: rows of one pass with gradients, whose activations are kept as in a training step.
        max_bytes: of the Jacobians of one pass; rows are split down to one where they would take more.

    Raises:
        ValueError: if λ is not positive.

    Reference:
        Yang, Robeyns, Wang, Aitchison: Bayesian low-rank adaptation for large language models, ICLR 2024,
        https://arxiv.org/abs/2308.13111, equations 12 and 13.
    """

    kind: ClassVar[str] = "linearised"
    model: nn.Module
    score: ClassLogits
    blocks: Mapping[str, Block] = field(repr=False)
    prior_precision: float
    fitted: Mapping[str, Any] = field(default_factory=dict, repr=False)
    adapter: str = ADAPTER
    max_rows: int = 4
    max_bytes: int = 2**30
    has_mean: bool = field(default=True, init=False)
    atoms: int | None = field(default=1000, init=False)  # draws of Gaussian logits cost nothing

    def __post_init__(self) -> None:
        if not self.prior_precision > 0:
            raise ValueError(
                f"the prior's precision must be positive: got {self.prior_precision}; 1 is a usual start"
            )

    def moments(
        self, inputs: Batch, precisions: Sequence[float] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean f_MAP (N, C) and covariance J·Σ·Jᵀ of the logits; an option that a row has not has no variance.

        Args:
            inputs: a batch of N rows.
            precisions: values of λ to take in place of the posterior's own.

        Returns:
            The mean, and the covariances (number of λ, N, C, C), or (N, C, C) where `precisions` is not given.
        """
        values = [self.prior_precision] if precisions is None else precisions
        inputs = on_device(inputs, self.model)
        num_rows = min(len(value) for value in inputs.values())
        starts = range(0, num_rows, self.max_rows)
        parts = [
            self._moments(_rows(inputs, num_rows, i, min(i + self.max_rows, num_rows)), values)
            for i in starts
        ]
        covariance = torch.cat([part[1] for part in parts], 1)
        return torch.cat([part[0] for part in parts]), covariance[
            0
        ] if precisions is None else covariance

    def _moments(self, inputs: Batch, precisions: Sequence[float]) -> tuple[Tensor, Tensor]:
        slots = replaceable_slots(self.model, list(self.blocks), self.adapter)
        trace = traced(self.model, self.score, inputs, slots)
        num_rows = len(trace.logits)
        num_bytes = (
            4 * trace.logits.numel() * sum(math.prod(block.shape) for block in self.blocks.values())
        )
        if num_rows == 1 or num_bytes <= self.max_bytes:
            with torch.autocast(trace.logits.device.type, enabled=False):
                return trace.logits.detach(), self._covariance(trace, precisions)
        del trace  # frees the graph
        halves = [(0, num_rows // 2), (num_rows // 2, num_rows)]
        parts = [self._moments(_rows(inputs, num_rows, *half), precisions) for half in halves]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], 1)

    def _covariance(self, trace: Trace, precisions: Sequence[float]) -> Tensor:
        """Σ over blocks of J·(H + λI)⁻¹·Jᵀ, (number of λ, N, C, C), from C backward passes."""
        num_rows, classes = trace.logits.shape
        present = trace.logits.detach().isfinite()
        jacobians: dict[str, Tensor] = {}
        for c in range(classes):
            weights = torch.zeros_like(present, dtype=torch.float32)
            weights[:, c] = present[:, c].float()
            for name, value in trace.jacobian(weights, keep=c < classes - 1).items():
                if name not in jacobians:
                    jacobians[name] = value.new_empty(num_rows, classes, *value.shape[1:])
                jacobians[name][:, c] = value
        total = trace.logits.new_zeros(
            len(precisions), num_rows, classes, classes, dtype=torch.float32
        )
        for name in list(jacobians):
            total = total + self.blocks[name].covariance(jacobians.pop(name), precisions)
        return total

    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """Gaussian draws of the logits (S, N, C); (1, N, C) for f_MAP."""
        if draws.count == 0:
            return mean_logits(self, inputs)
        draws.refuse_prefix(self)
        mean, covariance = self.moments(inputs)
        return gaussian_logits(mean, covariance, draws)

    def state(self) -> State:
        """The factors of each block by slot name, λ and the settings."""
        tensors = {
            f"{name}.{part}": value
            for name, block in self.blocks.items()
            for part, value in vars(block).items()
        }
        structure = next(iter(self.blocks.values())).structure
        facts = {"structure": structure, "prior_precision": self.prior_precision}
        return tensors, facts | {"max_rows": self.max_rows, "max_bytes": self.max_bytes}

    @classmethod
    def restore(cls, saved: Saved) -> Self:
        """The posterior of `state`.

        Raises:
            ValueError: if the tensors are not of this model's slots or shapes.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in saved.tensors.items():
            slot, _, part = name.rpartition(".")
            parts.setdefault(slot, {})[part] = value
        blocks: dict[str, Block] = {
            name: _BLOCKS[saved.facts["structure"]](**part) for name, part in parts.items()
        }
        weights = adapter_weights(saved.model, saved.adapter)
        _check(blocks, weights)
        blocks = {name: _on(block, weights[name].device) for name, block in blocks.items()}
        settings = {
            name: saved.facts[name] for name in ("prior_precision", "max_rows", "max_bytes")
        }
        return cls(saved.model, saved.score, blocks, adapter=saved.adapter, **settings)


@dataclass
class Sampled(Linearised):
    """q(θ) = N(θ_MAP, (H + λI)⁻¹) with draws of all matrices that have a block: "sampled Laplace", no linearisation.

    Each draw is θ_MAP + Σ^(1/2)·E with held noise E of the slot's name, an ordinary adapter. Curvature is known at
    θ_MAP only, so wide posteriors predict worse this way than linearised.
    """

    kind: ClassVar[str] = "sampled"
    atoms: int | None = field(default=None, init=False)
    _held: DrawCache = field(default_factory=DrawCache, init=False, repr=False)

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """One held draw by slot name, A (r, k) and B (d, r), float32 on the CPU.

        Args:
            index: which draw, from 0.
            seed: of the set of draws.
        """
        means = adapter_weights(self.model, self.adapter)
        weights = {}
        for name, block in self.blocks.items():
            noise = held_noise(block.shape, seed, index, name)
            with torch.autocast("cpu", enabled=False):
                weights[name] = means[name].float().cpu() + _on(block, "cpu").spread(
                    noise, self.prior_precision
                )
        return weights

    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """The drawn adapters' logits (S, N, C), see `drawn_logits`; (1, N, C) for f_MAP."""
        return drawn_logits(self, inputs, draws, self._held)  # type: ignore[arg-type]


def gaussian_logits(mean: Tensor, covariance: Tensor, draws: Draws) -> Tensor:
    """Held draws f + L·z_s (S, N, C) of Gaussian logits with mean (N, C) and covariance L·Lᵀ (N, C, C)."""
    root = semidefinite_root(covariance.double())
    noise = _noise(draws.indices, draws.seed, mean.shape[1]).to(root)
    return mean + torch.einsum("ncd,sd->snc", root, noise).to(mean.dtype)


@lru_cache(maxsize=16)
def _noise(indices: range, seed: int, classes: int) -> Tensor:
    """z (S, C): the same for all rows, and the first C of a wider batch's."""
    return torch.stack([held_noise((classes,), seed, index, _NOISE) for index in indices])


def _rows(inputs: Batch, num_rows: int, start: int, stop: int) -> dict[str, Tensor]:
    """Some rows of a batch, in which a tensor may have several consecutive entries a row (sequences of its options)."""
    sizes = {name: len(value) // num_rows for name, value in inputs.items()}
    return {name: value[start * sizes[name] : stop * sizes[name]] for name, value in inputs.items()}


def _on(block: Block, device: torch.device | str) -> Block:
    return type(block)(
        **{name: value.to(device, torch.float32) for name, value in vars(block).items()}
    )


def _check(blocks: Mapping[str, Block], weights: Mapping[str, Tensor]) -> None:
    got = {name: block.shape for name, block in blocks.items()}
    wrong = {
        n: shape for n, shape in got.items() if n not in weights or tuple(weights[n].shape) != shape
    }
    if wrong or not got:
        raise ValueError(
            f"curvature of another model or rank: got {len(got)} blocks, {len(wrong)} of them do not fit, such as "
            f"{next(iter(wrong.items()), None)}; expected the slots {list(weights)[:2]} … in their shapes"
        )
