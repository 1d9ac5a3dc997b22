"""Generalised Gauss-Newton blocks of LoRA's matrices at a fitted adapter, and Laplace's evidence.

The GGN of the likelihood is H = Σ_n J_nᵀ·Λ_n·J_n over the training rows, J_n the Jacobian of a
row's C class logits and Λ_n = diag(p_n) − p_n·p_nᵀ the Hessian of −log softmax: the Fisher matrix
under the model's own predictive. With Λ = R·Rᵀ, R (C, C − 1), the exact sum over classes takes
C − 1 backward passes, each on one column of R for all rows.

"diagonal" keeps the diagonal of H, exactly. "kfac" keeps KFAC-expand's approximation for weights
that tokens share, each matrix W (out, in) on its own: H ≈ 1/M·(Σ g·gᵀ) ⊗ (Σ a·aᵀ). Both sums are
over the M tokens of all rows, with inputs a and gradients g of R's columns; terms between different
tokens of a row are left out. It is exact if there is one token in all, or if all tokens have the
same a. A token counts if some gradient at it is not 0, so padding and tokens that no logit depends
on change nothing.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayestune.adapters import SIDES, OtherRows, Slots
from bayestune.curvature.blocks import Block, Diagonal, Kronecker, Structure
from bayestune.curvature.factors import factor_of
from bayestune.curvature.jacobian import Trace, jacobian_of, num_rows_of, some_rows, traced
from bayestune.errors import Refusal
from bayestune.forward import Batch, ClassLogits


@dataclass(frozen=True)
class Curvature:
    """What one pass over the training rows gives.

    Args:
        blocks: H of each LoRA matrix by slot name.
        log_likelihood: Σ log p(label) at the fitted adapter, in nats; 0 for batches without labels.
    """

    blocks: dict[str, Block]
    log_likelihood: float


def gauss_newton(
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

    Returns:
        A block for each slot, and the log-likelihood of the labels.

    Raises:
        Refusal: if `rank` is below 1, a slot cannot be watched (see `Slots.replaceable`), or one
            was never called.
    """
    if rank < 1:
        raise Refusal(
            f"the rank of the large factors must be 1 or more: got {rank}; the paper's is 10"
        )
    watched = slots.replaceable(slots.names(SIDES) if names is None else names)
    sum_class = _DiagonalSum if structure == "diagonal" else _KroneckerSum
    sums = {name: sum_class(slot.weight, rank) for name, slot in watched.items()}
    called: set[str] = set()
    log_likelihood = 0.0
    for batch, trace in _traces(slots.model, scorer, batches, watched):
        called |= set(trace.calls)
        with torch.autocast(trace.logits.device.type, enabled=False):
            root = softmax_root(trace.logits)
            last = root.shape[-1] - 1
            for j in range(last + 1):
                gradients = trace.gradients(root[..., j], keep=j < last)
                for name in list(gradients):
                    sums[name].add(gradients.pop(name))  # pop frees a slot's gradients once added
            for slot_sum in sums.values():
                slot_sum.close()
            if "labels" in batch:
                labels = batch["labels"].to(trace.logits.device)[:, None]
                logs = trace.logits.detach().double().log_softmax(-1).gather(1, labels)
                log_likelihood += logs.sum().item()
    if silent := sorted(set(watched) - called):
        raise Refusal(
            f"{len(silent)} of {len(watched)} slots were not called by any row, such as "
            f"{silent[0]}; leave their layers out of target_modules"
        )
    return Curvature({name: slot_sum.block() for name, slot_sum in sums.items()}, log_likelihood)


def _traces(
    model: nn.Module, scorer: ClassLogits, batches: Iterable[Batch], slots: Mapping[str, nn.Module]
) -> Iterator[tuple[Batch, Trace]]:
    """Each batch with its trace; a batch whose rows the slots do not see is split into its rows."""
    for batch in batches:
        try:
            trace = traced(model, scorer, batch, slots)
        except OtherRows:
            for index in range(num_rows_of(batch)):
                row = some_rows(batch, index, index + 1)
                yield row, traced(model, scorer, row, slots)
        else:
            yield batch, trace


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
        Tanabe, Sagae: An exact Cholesky decomposition of the variance-covariance matrix of the
        multinomial distribution, Journal of the Royal Statistical Society B, 1992.
    """
    p = logits.detach().double().softmax(-1)
    tails = p.flip(-1).cumsum(-1).flip(-1)
    tail = tails[:, :-1]  # q_j
    next_tail = tails[:, 1:]  # q_{j+1}
    scale = torch.where(next_tail > 0, (p[:, :-1] / tail).sqrt(), 0.0)
    divisor = torch.where(next_tail > 0, next_tail, 1.0).sqrt()
    below = -p[:, :, None] * (scale / divisor)[:, None]
    diagonal = torch.diag_embed(scale * next_tail.sqrt())
    return below.tril(-1) + nn.functional.pad(diagonal, (0, 0, 0, 1))


class _KroneckerSum:
    """Both factors of one matrix's H.

    For each batch `add` takes the calls' inputs and gradients once for every column of R; `close`
    then adds the inputs, once, of the tokens at which some column had a gradient.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        self.gradients = factor_of(weight, 0, rank)
        self.inputs = factor_of(weight, 1, rank)
        self.num_tokens = 0
        self.batch: list[tuple[Tensor, Tensor]] = []  # of each call: a, and the tokens that count

    def add(self, calls: list[tuple[Tensor, Tensor]]) -> None:
        for i, (a, g) in enumerate(calls):
            tokens = g.flatten(0, 1)
            counts = tokens.any(-1)
            self.gradients.add(tokens[counts])
            if i < len(self.batch):  # another column of R came before
                self.batch[i] = (a, counts | self.batch[i][1])
            else:
                self.batch.append((a, counts))

    def close(self) -> None:
        for a, counts in self.batch:
            self.inputs.add(a.flatten(0, 1)[counts])
            self.num_tokens += int(counts.sum())
        self.batch = []

    def block(self) -> Kronecker:
        out_vectors, out_values = self.gradients.eigen()
        in_vectors, in_values = self.inputs.eigen()
        return Kronecker(in_vectors, in_values / max(1, self.num_tokens), out_vectors, out_values)


class _DiagonalSum:
    """The diagonal of one matrix's H: Σ over rows and columns of R of the squared Jacobian."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.values = torch.zeros_like(weight.detach(), dtype=dtype)

    def add(self, calls: list[tuple[Tensor, Tensor]]) -> None:
        self.values += jacobian_of(calls).square().sum(0)

    def close(self) -> None:
        pass

    def block(self) -> Diagonal:
        return Diagonal(self.values)


def log_evidence(found: Curvature, square_norm: float, precision: float) -> float:
    """The Laplace approximation of log p(D | λ), in nats.

    log p(D) ≈ log p(D | θ) − λ/2·‖θ‖² − ½·log det(H + λI) + P/2·log λ, where the last two are −½·Σ
    log(1 + h/λ) over the eigenvalues h of H; those that a low-rank factor leaves out count as 0.

    Args:
        found: the blocks H, and log p(D | θ).
        square_norm: ‖θ‖² over the matrices that have a block.
        precision: λ.
    """
    volume = 0.0
    for block in found.blocks.values():
        volume += (block.eigenvalues.double() / precision).log1p().sum().item()
    return found.log_likelihood - precision * square_norm / 2 - volume / 2


def best_precision(found: Curvature, square_norm: float) -> float:
    """The λ with the largest evidence.

    As a function of log λ the evidence is concave: its slope ½·Σ h/(h + λ) − λ/2·‖θ‖² falls. The
    paper approaches the one maximum by 100 steps of Adam; bisection finds it to rounding.

    Args:
        found: the blocks H.
        square_norm: ‖θ‖² over the matrices that have a block.

    Raises:
        Refusal: if the curvature is 0, because the model is sure of every row, or ‖θ‖² is 0.
    """
    values = torch.cat([block.eigenvalues.double().flatten() for block in found.blocks.values()])
    trace = values.sum().item()
    if not (trace > 0 and square_norm > 0):
        raise Refusal(
            f"the evidence has no maximum: got curvature of trace {trace:.3g} and ‖θ‖² "
            f"{square_norm:.3g}, expected both positive; train less, or give prior_precision"
        )
    low = math.log(1e-15)
    high = math.log(1e15)
    for _ in range(100):
        middle = (low + high) / 2
        precision = math.exp(middle)
        if (values / (values + precision)).sum().item() > precision * square_norm:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)
