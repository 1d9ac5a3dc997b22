"""Curvature of LoRA's matrices at a fitted adapter: generalised Gauss-Newton blocks, and the Laplace evidence.

The GGN of the likelihood is H = Σ_n J_nᵀ·Λ_n·J_n over the training rows, J_n the Jacobian of a row's C class logits and
Λ_n = diag(p_n) − p_n·p_nᵀ the Hessian of −log softmax: the Fisher matrix under the model's own predictive. The sum over
classes is exact. With Λ = R·Rᵀ, R (C, C − 1), it takes C − 1 backward passes, each on one column of R for all rows.

"diagonal" keeps the diagonal of H, exactly. "kfac" keeps, for each matrix W (out, in) on its own, the approximation
KFAC-expand for weights that are shared over tokens: H ≈ 1/M·(Σ g·gᵀ) ⊗ (Σ a·aᵀ), with the inputs a and the gradients g
of R's columns summed over the M tokens of all rows; terms between different tokens of a row are left out. It is exact
for one token in all, or if all tokens have the same a. A token counts if some gradient at it is not 0: padding and
tokens that no logit depends on leave no trace.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayestune.adapters import SIDES, Slots
from bayestune.curvature.blocks import Block, Diagonal, Kronecker, Structure
from bayestune.curvature.jacobian import Calls, traced
from bayestune.forward import Batch, ClassLogits

FULL_UP_TO = 100
_POWERS = 2  # power iterations of the randomised decomposition; with twice the rank kept, its error is far below 1 %


def softmax_root(logits: Tensor) -> Tensor:
    """The Cholesky factor R of the softmax Hessian, R·Rᵀ = diag(p) − p·pᵀ, in closed form.

    With q_j = p_j + … + p_C: R_jj = √(p_j·q_{j+1}/q_j), R_ij = −p_i·√(p_j/(q_j·q_{j+1})) for i > j.

    Args:
        logits: (N, C), -inf where a row has fewer options.

    Returns:
        R (N, C, C − 1) in float64; rows of -inf logits are 0.

    Example:
        >>> softmax_root(torch.zeros(1, 2)).round(decimals=4).tolist()
        [[[0.5], [-0.5]]]

    Reference:
        Tanabe, Sagae: An exact Cholesky decomposition of the variance-covariance matrix of the multinomial
        distribution, Journal of the Royal Statistical Society B, 1992.
    """
    p = logits.detach().double().softmax(-1)
    tail = p.flip(-1).cumsum(-1).flip(-1)
    own, before, after = p[:, :-1], tail[:, :-1], tail[:, 1:]
    scale = torch.where(after > 0, (own / before).sqrt(), 0.0)
    below = -p[:, :, None] * (scale / torch.where(after > 0, after, 1.0).sqrt())[:, None]
    return below.tril(-1) + nn.functional.pad(torch.diag_embed(scale * after.sqrt()), (0, 0, 0, 1))


class _FullSum:
    """Σ x·xᵀ over rows x, as a matrix: for small sides."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.total: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        product = rows.mT @ rows
        self.total = product if self.total is None else self.total + product

    def eigen(self, like: Tensor) -> tuple[Tensor, Tensor]:
        total = like.new_zeros(self.size, self.size) if self.total is None else self.total
        values, vectors = torch.linalg.eigh(total.double())
        return vectors.to(total).contiguous(), values.clamp_min(0).to(total)


class _LowRankSum:
    """The leading eigenpairs of Σ x·xᵀ over a stream of rows, without the matrix: L·Lᵀ with L (size, 2·rank).

    Each batch of rows is stacked under Lᵀ and decomposed anew, by a randomised method with power iterations on a fixed
    seed. Twice the rank is kept between batches, so that little of what belongs to the leading ones is thrown away.
    """

    def __init__(self, size: int, rank: int) -> None:
        self.size, self.rank = size, rank
        self.root: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        stack = rows if self.root is None else torch.cat([self.root.mT, rows])
        width = min(2 * self.rank, self.size)
        if len(stack) <= width:
            self.root = stack.mT
            return
        sketch = torch.randn(len(stack), width, generator=torch.Generator().manual_seed(0)).to(
            stack
        )
        basis = torch.linalg.qr(stack.mT @ sketch).Q
        for _ in range(_POWERS):
            basis = torch.linalg.qr(stack.mT @ (stack @ basis)).Q
        inside = stack @ basis
        values, vectors = torch.linalg.eigh((inside.mT @ inside).double())
        self.root = basis @ (vectors * values.clamp_min(0).sqrt()).to(basis)

    def eigen(self, like: Tensor) -> tuple[Tensor, Tensor]:
        root = like.new_zeros(self.size, 1) if self.root is None else self.root
        vectors, values, _ = torch.linalg.svd(root, full_matrices=False)
        return vectors[:, : self.rank].contiguous(), values[: self.rank].square()


def _side(size: int, rank: int) -> _FullSum | _LowRankSum:
    return _FullSum(size) if size <= max(FULL_UP_TO, rank) else _LowRankSum(size, rank)


class _KroneckerSum:
    """Both factors of one matrix; a batch is added column of R by column, then closed."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        self.like = weight.detach().new_empty(
            0, dtype=torch.promote_types(weight.dtype, torch.float32)
        )
        self.gradients = _side(weight.shape[0], rank)
        self.inputs = _side(weight.shape[1], rank)
        self.num_tokens = 0
        self.batch: list[tuple[Tensor, Tensor]] = []

    def add(self, calls: list[tuple[Tensor, Tensor]]) -> None:
        for i, (a, g) in enumerate(calls):
            rows = g.flatten(0, 1)
            reached = rows.any(-1)
            self.gradients.add(rows[reached])
            if i < len(self.batch):
                reached = reached | self.batch[i][1]
            self.batch[i : i + 1] = [(a, reached)]

    def close(self) -> None:
        for a, reached in self.batch:
            self.inputs.add(a.flatten(0, 1)[reached])
            self.num_tokens += int(reached.sum())
        self.batch = []

    def block(self) -> Kronecker:
        out_vectors, out_values = self.gradients.eigen(self.like)
        in_vectors, in_values = self.inputs.eigen(self.like)
        return Kronecker(in_vectors, in_values / max(1, self.num_tokens), out_vectors, out_values)


class _DiagonalSum:
    """The diagonal of one matrix's GGN, exactly: Σ over rows and columns of R of the squared Jacobian."""

    def __init__(self, weight: Tensor, *_: int) -> None:
        self.values = torch.zeros_like(
            weight.detach(), dtype=torch.promote_types(weight.dtype, torch.float32)
        )

    def add(self, calls: list[tuple[Tensor, Tensor]]) -> None:
        self.values += sum(g.mT @ a for a, g in calls).square().sum(0)  # type: ignore[union-attr]

    def close(self) -> None:
        pass

    def block(self) -> Diagonal:
        return Diagonal(self.values)


_SUMS: dict[Structure, type[_KroneckerSum] | type[_DiagonalSum]] = {
    "kfac": _KroneckerSum,
    "diagonal": _DiagonalSum,
}


@dataclass(frozen=True)
class Curvature:
    """What one pass over the training rows gives.

    Args:
        blocks: H of each LoRA matrix by slot name.
        log_likelihood: Σ log p(label) over the rows at the fitted adapter, in nats; 0 for batches without labels.
    """

    blocks: dict[str, Block]
    log_likelihood: float


def curvature(
    slots: Slots,
    scorer: ClassLogits,
    batches: Iterable[Batch],
    *,
    structure: Structure = "kfac",
    rank: int = 10,
    names: Collection[str] | None = None,
) -> Curvature:
    """GGN blocks of LoRA's matrices, from one forward and C − 1 backward passes over the rows.

    Args:
        slots: of the fitted adapter; the passes run in evaluation mode.
        scorer: maps (model, batch) to class logits (N, C).
        batches: the training rows.
        structure: "kfac" or "diagonal".
        rank: eigenpairs kept of a Kronecker factor's large side.
        names: slots to take; None for A and B of every layer.

    Raises:
        ValueError: if a slot cannot be watched, as `Slots.replaceable`, or one was never called.
    """
    if rank < 1:
        raise ValueError(
            f"the rank of the large factors must be 1 or more: got {rank}; the paper's is 10"
        )
    watched = slots.replaceable(slots.names(SIDES) if names is None else names)
    sums = {name: _SUMS[structure](slot.weight, rank) for name, slot in watched.items()}
    called: set[str] = set()
    total = 0.0
    for batch in batches:
        trace = traced(slots.model, scorer, batch, watched)
        called |= set(trace.calls)
        with torch.autocast(trace.logits.device.type, enabled=False):
            columns = softmax_root(trace.logits)
            for j in range(columns.shape[-1]):
                _add(sums, trace.gradients(columns[..., j], keep=j < columns.shape[-1] - 1))
            for part in sums.values():
                part.close()
            if "labels" in batch:
                total += _log_likelihood(trace.logits, batch["labels"])
    if silent := sorted(set(watched) - called):
        raise ValueError(
            f"{len(silent)} of {len(watched)} slots were not called by any row, such as {silent[0]}; leave their layers "
            "out of target_modules"
        )
    return Curvature({name: part.block() for name, part in sums.items()}, total)


def _add(sums: Mapping[str, _KroneckerSum | _DiagonalSum], gradients: Calls) -> None:
    for name in list(gradients):
        sums[name].add(gradients.pop(name))


def _log_likelihood(logits: Tensor, labels: Tensor) -> float:
    chosen = logits.detach().double().log_softmax(-1).gather(1, labels.to(logits.device)[:, None])
    return chosen.sum().item()


def log_evidence(found: Curvature, square_norm: float, precision: float) -> float:
    """The Laplace approximation of log p(D | λ), in nats.

    log p(D) ≈ log p(D | θ) − λ/2·‖θ‖² − ½·log det(H + λI) + P/2·log λ, the last two being −½·Σ log(1 + h/λ) over the
    eigenvalues h of H: those that a low-rank factor leaves out are 0.

    Args:
        found: blocks and log-likelihood.
        square_norm: ‖θ‖² over the matrices that have a block.
        precision: λ.
    """
    volume = sum(
        (block.eigenvalues.double() / precision).log1p().sum().item()
        for block in found.blocks.values()
    )
    return found.log_likelihood - precision * square_norm / 2 - volume / 2


def best_precision(found: Curvature, square_norm: float) -> float:
    """The λ with the largest evidence.

    As a function of log λ the evidence is concave: its slope ½·Σ h/(h + λ) − λ/2·‖θ‖² falls. So there is one maximum,
    which the paper approaches by 100 steps of Adam and bisection finds to rounding.

    Args:
        found: blocks and log-likelihood.
        square_norm: ‖θ‖² over the matrices that have a block.

    Raises:
        ValueError: if the curvature is 0, so that no λ is best: the model is sure of every row.
    """
    values = torch.cat([block.eigenvalues.double().flatten() for block in found.blocks.values()])
    if not ((trace := values.sum().item()) > 0 and square_norm > 0):
        raise ValueError(
            f"the evidence has no maximum: got curvature of trace {trace:.3g} and ‖θ‖² {square_norm:.3g}, "
            "expected both positive; train less, or give prior_precision"
        )
    low, high = math.log(1e-15), math.log(1e15)
    for _ in range(100):
        middle = (low + high) / 2
        precision = math.exp(middle)
        if (values / (values + precision)).sum().item() > precision * square_norm:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)
