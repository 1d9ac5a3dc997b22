"""The curvature of the likelihood in LoRA's matrices at a fitted adapter, and the Laplace evidence.

`gauss_newton` makes the matrices' blocks from the training rows; Laplace's posteriors build on them.
"""

from bayestune.curvature.blocks import Block, Diagonal, Kronecker, Structure, semidefinite_root
from bayestune.curvature.evidence import best_precision, log_evidence
from bayestune.curvature.ggn import Curvature, gauss_newton
from bayestune.curvature.jacobian import Trace, traced

__all__ = [
    "Block",
    "Curvature",
    "Diagonal",
    "Kronecker",
    "Structure",
    "Trace",
    "best_precision",
    "gauss_newton",
    "log_evidence",
    "semidefinite_root",
    "traced",
]
