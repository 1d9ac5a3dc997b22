"""The Laplace approximation of the evidence, and the prior's precision that makes it largest."""

import math

import torch

from bayestune.curvature.ggn import Curvature


def log_evidence(found: Curvature, square_norm: float, precision: float) -> float:
    """The Laplace approximation of log p(D | λ), in nats.

    log p(D) ≈ log p(D | θ) − λ/2·‖θ‖² − ½·log det(H + λI) + P/2·log λ, the last two being
    −½·Σ log(1 + h/λ) over the eigenvalues h of H: those that a low-rank factor leaves out are 0.

    Args:
        found: blocks and log-likelihood.
        square_norm: ‖θ‖² over the matrices that have a block.
        precision: λ.
    """
    volume = 0.0
    for block in found.blocks.values():
        volume += (block.eigenvalues.double() / precision).log1p().sum().item()
    return found.log_likelihood - precision * square_norm / 2 - volume / 2


def best_precision(found: Curvature, square_norm: float) -> float:
    """The λ with the largest evidence.

    As a function of log λ the evidence is concave: its slope ½·Σ h/(h + λ) − λ/2·‖θ‖² falls. So there
    is one maximum, which the paper approaches by 100 steps of Adam and bisection finds to rounding.

    Args:
        found: blocks and log-likelihood.
        square_norm: ‖θ‖² over the matrices that have a block.

    Raises:
        ValueError: if the curvature is 0, so that no λ is best: the model is sure of every row.
    """
    values = torch.cat([block.eigenvalues.double().flatten() for block in found.blocks.values()])
    trace = values.sum().item()
    if not (trace > 0 and square_norm > 0):
        raise ValueError(
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
