"""The curvature of LoRA's matrices at a fitted adapter: Jacobians, Gauss-Newton blocks and the Laplace evidence.

Laplace's posteriors and TFB-like searches build on it.
"""

from bayestune.curvature.blocks import Block, Diagonal, Kronecker, Structure, semidefinite_root
from bayestune.curvature.ggn import Curvature, best_precision, curvature, log_evidence
from bayestune.curvature.jacobian import Trace, traced

__all__ = [
    "Block",
    "Curvature",
    "Diagonal",
    "Kronecker",
    "Structure",
    "Trace",
    "best_precision",
    "curvature",
    "log_evidence",
    "semidefinite_root",
    "traced",
]
