"""Laplace posteriors over LoRA's matrices: by linearising the logits, or by drawing adapters."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bayestune.adapters import OtherRows, Slots, held_noise, split_name
from bayestune.curvature import (
    Block,
    Diagonal,
    Kronecker,
    Trace,
    semidefinite_root,
    some_rows,
    traced,
)
from bayestune.errors import Refusal
from bayestune.forward import Batch, Draws, on_device
from bayestune.posteriors.posterior import AdapterPosterior, Saved, SingleAdapter, State

_BLOCKS: dict[str, type[Any]] = {"kfac": Kronecker, "diagonal": Diagonal}


@dataclass
class _Laplace(SingleAdapter):
    """q(θ) = N(θ_MAP, Σ), Σ = (H + λI)⁻¹ block by block, around the adapter that holds θ_MAP.

    Args:
        blocks: H of each LoRA matrix by slot name; the others are points.
        prior_precision: λ.
        max_rows: rows of one pass with gradients, whose activations are kept as in a training step.
        max_bytes: of the Jacobians of one pass; rows are split, down to one, where they take more.

    Raises:
        Refusal: if λ is not positive.
    """

    blocks: Mapping[str, Block] = field(repr=False)
    prior_precision: float
    max_rows: int = 4
    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prior_precision > 0:
            raise Refusal(
                f"the prior's precision must be positive: got {self.prior_precision}; 1 is usual"
            )

    def state(self) -> State:
        """The factors of each block by slot name, λ and the settings."""
        tensors = {}
        for name, block in self.blocks.items():
            tensors |= {f"{name}.{part}": value for part, value in vars(block).items()}
        facts: dict[str, Any] = {"structure": next(iter(self.blocks.values())).structure}
        for name in ("prior_precision", "max_rows", "max_bytes"):
            facts[name] = getattr(self, name)
        return tensors, facts

    @classmethod
    def restore(cls, saved: Saved) -> Self:
        """The posterior of a saved `state`."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in saved.tensors.items():
            slot, part = split_name(name)
            parts.setdefault(slot, {})[part] = value
        facts = dict(saved.facts)
        kind = _BLOCKS[facts.pop("structure")]
        blocks = {name: kind(**part) for name, part in parts.items()}
        weights = Slots(saved.model, saved.adapter).weights()
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        unfit = {n: block.shape for n, block in blocks.items() if shapes.get(n) != block.shape}
        if unfit or not blocks:
            raise Refusal(
                f"curvature of another model or rank: got {len(blocks)} blocks, {len(unfit)} of "
                f"them do not fit, such as {next(iter(unfit.items()), None)}; expected the slots "
                f"{list(weights)[:2]} … in their shapes"
            )
        blocks = {name: _on(block, weights[name].device) for name, block in blocks.items()}
        return cls(saved.model, saved.scorer, blocks, adapter=saved.adapter, **facts)


@dataclass
class Linearised(_Laplace):
    """The Laplace posterior seen through the model's linearisation in θ at θ_MAP.

    The class logits of a row are then Gaussian: f ~ N(f_MAP, J·Σ·Jᵀ), J the Jacobian of its C
    logits with respect to the LoRA matrices that have a block. Draw s of row n is f_MAP + L_n·z_s
    with L_n·L_nᵀ = J_n·Σ·J_nᵀ, and z_s (C,) is the held noise with the address (seed, s,
    "laplace"). Each row has its exact law; how rows vary together is not kept, since all rows share
    z_s. A draw is not an adapter; for that see `Sampled`.

    Reference:
        Yang, Robeyns, Wang, Aitchison: Bayesian low-rank adaptation for large language models
        (equations 12 and 13), ICLR 2024, https://arxiv.org/abs/2308.13111.
    """

    kind: ClassVar[str] = "linearised"
    atoms = 1000  # so many are always taken: draws of Gaussian logits cost nothing

    def passes(self, draws: int) -> int:
        """One, whose gradients give the law of the logits; draws of it cost nothing."""
        return 1

    def moments(
        self, inputs: Batch, precisions: Sequence[float] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean f_MAP and covariance J·Σ·Jᵀ of the logits of a batch of N rows.

        Args:
            inputs: the batch.
            precisions: several λ, for each of which Σ is taken; None for the posterior's own.

        Returns:
            The mean (N, C) and the covariance (N, C, C); with `precisions` (number of λ, N, C, C).
            The covariance of an option that a row does not have is 0.
        """
        values = [self.prior_precision] if precisions is None else precisions
        inputs = on_device(inputs, self.model)
        num_rows = min(len(value) for value in inputs.values())
        pieces: list[tuple[Tensor, Tensor]] = []
        for start in range(0, num_rows, self.max_rows):
            rows = some_rows(inputs, start, min(start + self.max_rows, num_rows))
            pieces.extend(self._moments(rows, values))
        mean = torch.cat([mean for mean, _ in pieces])
        covariance = torch.cat([covariance for _, covariance in pieces], 1)
        return mean, covariance[0] if precisions is None else covariance

    def _moments(
        self, inputs: Batch, precisions: Sequence[float]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The moments of some rows, which are halved until the Jacobians fit in `max_bytes`.

        They are also halved, down to one row, where the model's layers do not see the rows.
        """
        slots = self.slots.replaceable(list(self.blocks))
        num_rows = min(len(value) for value in inputs.values())
        try:
            trace = traced(self.model, self.scorer, inputs, slots)
        except OtherRows:
            if num_rows == 1:
                raise
        else:
            num_rows = len(trace.logits)
            size = sum(math.prod(block.shape) for block in self.blocks.values())
            if num_rows == 1 or 4 * trace.logits.numel() * size <= self.max_bytes:
                yield trace.logits.detach(), self._covariance(trace, precisions)
                return
            del trace  # frees the graph
        half = num_rows // 2
        yield from self._moments(some_rows(inputs, 0, half), precisions)
        yield from self._moments(some_rows(inputs, half, num_rows), precisions)

    def _covariance(self, trace: Trace, precisions: Sequence[float]) -> Tensor:
        """Σ over blocks of J·(H + λI)⁻¹·Jᵀ, (number of λ, N, C, C), from C backward passes."""
        num_rows, classes = trace.logits.shape
        present = trace.logits.detach().isfinite().float()
        jacobians: dict[str, list[Tensor]] = {}
        shape = (len(precisions), num_rows, classes, classes)
        total = present.new_zeros(shape)
        with torch.autocast(present.device.type, enabled=False):
            for c in range(classes):
                weights = torch.zeros_like(present)
                weights[:, c] = present[:, c]
                for name, value in trace.jacobian(weights, keep=c < classes - 1).items():
                    jacobians.setdefault(name, []).append(value)
            for name in list(jacobians):
                jacobian = torch.stack(jacobians.pop(name), 1)
                total = total + self.blocks[name].covariance(jacobian, precisions)
        return total

    def _drawn(self, inputs: Batch, draws: Draws) -> Tensor:
        self.refuse_shared_prefix(draws)
        mean, covariance = self.moments(inputs)
        return gaussian_logits(mean, covariance, draws)


@dataclass
class Sampled(_Laplace, AdapterPosterior):
    """The Laplace posterior with draws of all matrices that have a block, no linearisation.

    Each draw is θ_MAP + Σ^(1/2)·E with held noise E of the slot's name, an ordinary adapter.
    Curvature is known at θ_MAP only, so wide posteriors predict worse this way than linearised.
    """

    kind: ClassVar[str] = "sampled"

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """One held draw of the matrices that have a block."""
        means = self.slots.weights()
        weights = {}
        for name, block in self.blocks.items():
            noise = held_noise(block.shape, seed, index, name)
            with torch.autocast("cpu", enabled=False):
                spread = _on(block, "cpu").spread(noise, self.prior_precision)
                weights[name] = means[name].float().cpu() + spread
        return weights


def gaussian_logits(mean: Tensor, covariance: Tensor, draws: Draws) -> Tensor:
    """Held draws f + L·z_s of Gaussian logits; z_s (C,) has the address (seed, s, "laplace").

    Args:
        mean: f (N, C).
        covariance: L·Lᵀ (N, C, C).
        draws: which draws, and their seed.

    Returns:
        Logits (S, N, C).
    """
    root = semidefinite_root(covariance.double())
    noise = _noise(draws.indices, draws.seed, mean.shape[1]).to(root)
    return mean + torch.einsum("ncd,sd->snc", root, noise).to(mean.dtype)


@lru_cache(maxsize=16)
def _noise(indices: range, seed: int, classes: int) -> Tensor:
    """z (S, C): the same for all rows, and the first C of a wider batch's."""
    return torch.stack([held_noise((classes,), seed, index, "laplace") for index in indices])


def _on(block: Block, device: torch.device | str) -> Block:
    return type(block)(**{name: v.to(device, torch.float32) for name, v in vars(block).items()})
