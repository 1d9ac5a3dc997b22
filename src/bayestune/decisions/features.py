"""How far a row lies from the training rows in the adapter's own activations."""

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from bayestune.errors import Refusal

Activations = Mapping[str, Tensor]  # h = A x, (N, r) by slot name
# A slot whose activations vary by less than this share of their size sees the same token in every
# row, as the first layer does at the end of a prompt. The variation is then rounding (bfloat16: up
# to 0.4 %), which the inverse covariance would blow up. Second layers vary by 2 % and more.
_LEAST_VARIATION = 0.003
_LEAST_SHRINKAGE = 1e-6  # keeps Σ invertible where rows vary along one line alone


def shrunk_covariance(centred: Tensor) -> Tensor:
    """Ledoit and Wolf's covariance, (1 − ρ) Σ + ρ (tr Σ/k) I with Σ = XᵀX/N, (k, k).

    ρ = β/δ, clamped to [1e-6, 1] so that two rows are enough; δ = ‖Σ − (tr Σ/k) I‖²,
    β = (1/N²) Σ_n ‖x_n x_nᵀ − Σ‖².

    Args:
        centred: X (N, k), rows less their mean.

    Reference: Ledoit, Wolf (2004), https://doi.org/10.1016/S0047-259X(03)00096-4
    """
    rows, width = centred.shape
    plain = centred.T @ centred / rows
    target = plain.trace() / width * torch.eye(width, dtype=plain.dtype)
    distance = (plain - target).square().sum()
    squares = centred.square().sum(-1).square().sum()  # Σ_n ‖x_n x_nᵀ‖²
    noise = (squares / rows - plain.square().sum()) / rows
    shrinkage = (noise / distance).clamp(_LEAST_SHRINKAGE, 1) if distance > 0 else torch.ones(())
    return (1 - shrinkage) * plain + shrinkage * target


@dataclass(frozen=True, eq=False)
class Distance:
    """Mahalanobis distances from the training rows, summed over slots.

    Args:
        means: μ (r,) by slot name.
        roots: W (r, r) with W Wᵀ = Σ⁻¹, by slot name.
    """

    means: Mapping[str, Tensor]
    roots: Mapping[str, Tensor]

    @classmethod
    def fit(cls, activations: Activations) -> Self:
        """Takes mean and shrunk covariance of each slot whose activations vary over training rows.

        Means and roots are rounded to float32, the precision in which they are kept.

        Args:
            activations: h (N, r) by slot name; ranks may differ.

        Raises:
            Refusal: if there are fewer than two rows, other shapes, or no slot varies.
        """
        means = {}
        roots = {}
        for name, values in _checked(activations).items():
            if len(values) < 2:
                got = "activations of one row"
                raise Refusal(f"got {got}; expected two or more; give the training rows")
            mean = values.mean(0)
            centred = values - mean
            if centred.square().mean() <= _LEAST_VARIATION**2 * values.square().mean():
                continue
            precision = torch.linalg.inv(shrunk_covariance(centred))
            means[name] = mean.float().double()
            roots[name] = torch.linalg.cholesky(precision).float().double()
        if not means:
            got = f"{len(activations)} slots whose activations are all the same"
            raise Refusal(f"got {got}; expected some variation; give rows that differ")
        return cls(means, roots)

    def whitened(self, activations: Activations) -> Tensor:
        """Wᵀ(h − μ) of all slots, (N, Σ r): points whose squared length is the distance.

        Raises:
            Refusal: if a slot is missing or has another rank.
        """
        values = _checked(activations)
        parts = []
        for name, mean in self.means.items():
            h = values.get(name)
            if h is None or h.shape[1] != len(mean):
                got = "no activations" if h is None else f"activations of shape {(*h.shape,)}"
                expected = f"(N, {len(mean)})"
                raise Refusal(f"got {got} of {name}; expected {expected}; take the same adapter")
            parts.append((h - mean) @ self.roots[name])
        return torch.cat(parts, 1)

    def of(self, activations: Activations) -> Tensor:
        """d = Σ_l (h_l − μ_l)ᵀ Σ_l⁻¹ (h_l − μ_l), (N,), over slots l.

        Reference: Lee et al. (2018), https://arxiv.org/abs/1807.03888
        """
        return self.whitened(activations).square().sum(-1)

    def to_json(self) -> dict[str, str]:
        """μ, then W row by row, of each slot: float32, little-endian, as base64."""
        texts = {}
        for name, mean in self.means.items():
            numbers = torch.cat([mean[None], self.roots[name]]).flatten()
            data = numbers.numpy().astype("<f4").tobytes()
            texts[name] = base64.b64encode(data).decode("ascii")
        return texts

    @classmethod
    def from_json(cls, texts: Mapping[str, str]) -> Self:
        """The distance that `to_json` wrote."""
        means = {}
        roots = {}
        for name, text in texts.items():
            numbers = torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").copy())
            rank = math.isqrt(len(numbers))  # of r + r² numbers
            means[name], roots[name] = numbers.double().split([rank, rank * rank])
            roots[name] = roots[name].reshape(rank, rank)
        return cls(means, roots)


def spread_out(activations: Activations) -> Tensor | None:
    """Rows as points (N, Σ r) whose squared distances are Mahalanobis's.

    Args:
        activations: h (N, r) by slot name; the rows themselves give means and covariances.

    Returns:
        The points; None if there are none, as of one row or of rows that are all alike.
    """
    try:
        return Distance.fit(activations).whitened(activations)
    except Refusal:
        return None


def _checked(activations: Activations) -> dict[str, Tensor]:
    """The activations in float64 on the CPU; refuses what is not finite (N, r) for each slot."""
    checked = {}
    counts = {len(values) for values in activations.values()}
    if len(counts) != 1:
        got = f"activations of {sorted(counts)} rows"
        raise Refusal(f"got {got}; expected as many of every slot; take them of the same rows")
    for name, values in activations.items():
        if values.ndim != 2 or 0 in values.shape or not values.isfinite().all():
            got = f"activations of {name} of shape {tuple(values.shape)}"
            raise Refusal(f"got {got}; expected finite (N, r); put rows first")
        checked[name] = values.detach().cpu().double()
    return checked
