"""The eigenpairs of Σ x·xᵀ over a stream of rows x: a Kronecker factor in the making."""

import torch
from torch import Tensor

FULL_UP_TO = 100  # sides up to this size are kept whole
_POWERS = 2  # power iterations


class FullSum:
    """Σ x·xᵀ as a matrix, for small sides."""

    def __init__(self, size: int, like: Tensor) -> None:
        self.total = like.new_zeros(size, size)

    def add(self, rows: Tensor) -> None:
        """Adds rows (M, size)."""
        self.total += rows.mT @ rows

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Orthonormal columns (size, size) and all eigenvalues."""
        values, vectors = torch.linalg.eigh(self.total.double())
        return vectors.to(self.total).contiguous(), values.clamp_min(0).to(self.total)


class LowRankSum:
    """The leading eigenpairs of Σ x·xᵀ without the matrix: L·Lᵀ with L (size, 2·rank).

    Each batch of rows is stacked under Lᵀ and decomposed anew, by randomised power iterations with
    a fixed seed. Twice the rank is kept between batches, and the rest is lost. So eigenvalues come
    out too low: of ten, where the spectrum falls as slowly as k^(−1/2), by 5 to 10 % on average and
    the last one by up to a quarter; where it falls as 1/k, by 1 % on average and the last by 3 %.
    """

    def __init__(self, size: int, rank: int, like: Tensor) -> None:
        self.size = size
        self.rank = rank
        self.root = like.new_zeros(size, 0)

    def add(self, rows: Tensor) -> None:
        """Adds rows (M, size)."""
        stack = torch.cat([self.root.mT, rows])
        width = min(2 * self.rank, self.size)
        if len(stack) <= width:
            self.root = stack.mT
            return
        generator = torch.Generator().manual_seed(0)
        sketch = torch.randn(len(stack), width, generator=generator).to(stack)
        basis = torch.linalg.qr(stack.mT @ sketch).Q
        for _ in range(_POWERS):
            basis = torch.linalg.qr(stack.mT @ (stack @ basis)).Q
        coordinates = stack @ basis
        values, vectors = torch.linalg.eigh((coordinates.mT @ coordinates).double())
        self.root = basis @ (vectors * values.clamp_min(0).sqrt()).to(basis)

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Orthonormal columns (size, rank) and the leading eigenvalues, the largest first."""
        vectors, values, _ = torch.linalg.svd(self.root, full_matrices=False)
        return vectors[:, : self.rank].contiguous(), values[: self.rank].square()


def factor_of(weight: Tensor, side: int, rank: int) -> FullSum | LowRankSum:
    """An empty sum for the outputs (side 0) or inputs (side 1) of W (out, in), in float32 or more.

    Args:
        weight: W.
        side: 0 or 1.
        rank: eigenpairs that are kept of a large side.
    """
    size = weight.shape[side]
    like = weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))
    return FullSum(size, like) if size <= max(FULL_UP_TO, rank) else LowRankSum(size, rank, like)
