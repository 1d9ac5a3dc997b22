"""How far a row lies from the training rows in the adapter's own activations."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bayestune.errors import Refusal


def shrunk_covariance(centred: Tensor) -> Tensor:
    """Ledoit and Wolf's covariance, (1 − ρ) Σ + ρ (tr Σ/k) I with Σ = XᵀX/N, (k, k).

    ρ = min(1, β/δ), δ = ‖Σ − (tr Σ/k) I‖², β = (1/N²) Σ_n ‖x_n x_nᵀ − Σ‖².

    Args:
        centred: X (N, k), its mean taken away.

    Reference: Ledoit, Wolf (2004), https://doi.org/10.1016/S0047-259X(03)00096-4
    """
    rows, width = centred.shape
    plain = centred.T @ centred / rows
    target = plain.trace() / width * torch.eye(width, dtype=plain.dtype)
    distance = (plain - target).square().sum()
    squares = centred.square().sum(-1).square().sum()  # Σ_n ‖x_n x_nᵀ‖²
    noise = (squares / rows - plain.square().sum()) / rows
    shrinkage = (noise / distance).clamp(0, 1) if distance > 0 else torch.ones(())
    return (1 - shrinkage) * plain + shrinkage * target


@dataclass(frozen=True, eq=False)
class Distance:
    """Mahalanobis distances from the training rows, summed over layers.

    Args:
        means: μ (L, k).
        precisions: Σ⁻¹ (L, k, k).
    """

    means: Tensor
    precisions: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> Self:
        """Means and shrunk covariances of features (N, L, k) of training rows.

        Raises:
            Refusal: if there are fewer than two rows, other shapes, or a layer does not vary.
        """
        values = _checked(features)
        if len(values) < 2:
            raise Refusal("got features of one row; expected two or more; give the training rows")
        means = values.mean(0)
        centred = (values - means).unbind(1)
        if any(layer.abs().max() == 0 for layer in centred):
            raise Refusal("got a layer whose features are all the same; expected some variation")
        covariances = torch.stack([shrunk_covariance(layer) for layer in centred])
        return cls(means, torch.linalg.inv(covariances))

    def of(self, features: Tensor) -> Tensor:
        """d = Σ_l (h_l − μ_l)ᵀ Σ_l⁻¹ (h_l − μ_l), (N,), of features h (N, L, k).

        Reference: Lee et al. (2018), https://arxiv.org/abs/1807.03888
        """
        values = _checked(features)
        if values.shape[1:] != self.means.shape:
            got = f"features of shape {tuple(values.shape)}"
            expected = f"(N, {', '.join(map(str, self.means.shape))})"
            raise Refusal(f"got {got}; expected {expected}; take them from the same adapter")
        centred = values - self.means
        return torch.einsum("nlk,lkj,nlj->n", centred, self.precisions, centred)


def _checked(features: Tensor) -> Tensor:
    if features.ndim != 3 or 0 in features.shape or not features.isfinite().all():
        got = f"features of shape {tuple(features.shape)}"
        raise Refusal(f"got {got}; expected finite (N, L, k); put rows first and layers second")
    return features.detach().cpu().double()
