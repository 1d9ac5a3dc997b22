"""The curvature H of one LoRA matrix, and the Gaussian with precision H + λ·I.

Symbols: W (out, in) one of LoRA's matrices; H its generalised Gauss-Newton matrix, a sum over the
training rows; λ the prior's precision; J (N, C, out, in) the Jacobians of the class logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

Structure = Literal["kfac", "diagonal"]


@dataclass(frozen=True)
class Kronecker:
    """H = F_out ⊗ F_in, each factor given by its eigenpairs; H is 0 outside of their span.

    With U the vectors and h_ij = out_i·in_j, (H + λI)⁻¹ scales U_outᵀ·X·U_in by 1/(h_ij + λ) and
    the rest by 1/λ: Woodbury's identity, without a matrix of the large side's size.

    Args:
        in_vectors: orthonormal columns (in, q); q < in for a low-rank factor.
        in_values: eigenvalues (q,).
        out_vectors: orthonormal columns (out, p).
        out_values: eigenvalues (p,).
    """

    structure: ClassVar[Structure] = "kfac"
    in_vectors: Tensor
    in_values: Tensor
    out_vectors: Tensor
    out_values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """The matrix's (out, in)."""
        return self.out_vectors.shape[0], self.in_vectors.shape[0]

    @property
    def eigenvalues(self) -> Tensor:
        """The eigenvalues h (p, q) of H; all others are 0."""
        return self.out_values[:, None] * self.in_values

    def covariance(self, jacobians: Tensor, precisions: Sequence[float]) -> Tensor:
        """The logits' covariance J·(H + λI)⁻¹·Jᵀ for each λ, semidefinite up to rounding.

        Args:
            jacobians: J (N, C, out, in).
            precisions: values of λ.

        Returns:
            (number of λ, N, C, C).
        """
        inside, outside = self._split(jacobians)
        rest = 0 if outside is None else _gram(outside)
        scales = [(self.eigenvalues + precision).rsqrt() for precision in precisions]
        pairs = zip(scales, precisions, strict=True)
        return torch.stack([_gram(inside * scale) + rest / precision for scale, precision in pairs])

    def spread(self, noise: Tensor, precision: float) -> Tensor:
        """A draw (H + λI)^(-1/2)·E (out, in), from standard normal E (out, in)."""
        inside, outside = self._split(noise)
        scaled = inside * (self.eigenvalues + precision).rsqrt()
        draw = self.out_vectors @ scaled @ self.in_vectors.mT
        return draw if outside is None else draw + outside * precision**-0.5

    def _split(self, matrices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Coordinates (…, p, q) in the span of the vectors, and the rest (…, out, in), if any."""
        inside = self.out_vectors.mT @ matrices @ self.in_vectors
        if inside.shape[-2:] == self.shape:
            return inside, None
        return inside, matrices - self.out_vectors @ inside @ self.in_vectors.mT


@dataclass(frozen=True)
class Diagonal:
    """H = diag(values), `values` in the matrix's shape (out, in)."""

    structure: ClassVar[Structure] = "diagonal"
    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """The matrix's (out, in)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def eigenvalues(self) -> Tensor:
        """The eigenvalues h (out, in)."""
        return self.values

    def covariance(self, jacobians: Tensor, precisions: Sequence[float]) -> Tensor:
        """The logits' covariance J·(H + λI)⁻¹·Jᵀ for each λ, as `Kronecker.covariance`."""
        scales = [(self.values + precision).rsqrt() for precision in precisions]
        return torch.stack([_gram(jacobians * scale) for scale in scales])

    def spread(self, noise: Tensor, precision: float) -> Tensor:
        """A draw (H + λI)^(-1/2)·E (out, in), from standard normal E (out, in)."""
        return noise * (self.values + precision).rsqrt()


Block = Kronecker | Diagonal


def _gram(matrices: Tensor) -> Tensor:
    """Inner products (N, C, C) of each row's C matrices (N, C, …)."""
    flat = matrices.flatten(2)
    return flat @ flat.mT


def semidefinite_root(covariance: Tensor) -> Tensor:
    """The lower triangular Cholesky factor L of semidefinite matrices, which may be singular.

    A class without variance (an option that the row does not have) has zeros in its row and column,
    and the factor of the first classes does not depend on those after them.

    Args:
        covariance: matrices (…, C, C).

    Returns:
        L (…, C, C).

    Example:
        >>> semidefinite_root(torch.tensor([[4.0, 2, 0], [2, 1, 0], [0, 0, 0]])).tolist()
        [[2.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    root = torch.zeros_like(covariance)
    floor = covariance.diagonal(dim1=-2, dim2=-1) * 1e-12
    for j in range(covariance.shape[-1]):
        left = covariance[..., j] - (root[..., :j] @ root[..., j, :j, None])[..., 0]
        pivot = torch.where(left[..., j] > floor[..., j], left[..., j], torch.inf)
        column = left / pivot.sqrt()[..., None]
        root[..., j:, j] = column[..., j:]
    return root
