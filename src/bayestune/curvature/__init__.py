"""The likelihood's curvature in LoRA's matrices at a fitted adapter, and the Laplace evidence.

`gauss_newton` makes a block for each matrix from the training rows; Laplace builds on them.
"""

from bayestune.curvature.blocks import Block, Diagonal, Kronecker, Structure, semidefinite_root
from bayestune.curvature.ggn import Curvature, best_precision, gauss_newton, log_evidence
from bayestune.curvature.jacobian import Trace, some_rows, traced

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
    "some_rows",
    "traced",
]
