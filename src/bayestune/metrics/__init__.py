"""Numbers from probabilities and labels: proper scores, calibration, rankings, intervals.

These are plain functions that know nothing of models, posteriors or files.
"""

from bayestune.metrics.class_counts import confusion, precision_recall_f1
from bayestune.metrics.intervals import (
    LEVEL,
    CalibratedLevel,
    Interval,
    PairedDifference,
    calibrated_level,
    paired_bootstrap,
    summarise,
)
from bayestune.metrics.multiplicity import holm
from bayestune.metrics.ranking import (
    SCORES,
    Row,
    auroc,
    error_auroc,
    is_right,
    risk_coverage,
    shift_auroc,
    uncertainty,
)
from bayestune.metrics.scores import (
    Binning,
    Bins,
    Reliability,
    accuracy,
    aurc,
    brier,
    ece,
    ece_debiased,
    nll,
    reliability,
)

__all__ = [
    "LEVEL",
    "SCORES",
    "Binning",
    "Bins",
    "CalibratedLevel",
    "Interval",
    "PairedDifference",
    "Reliability",
    "Row",
    "accuracy",
    "aurc",
    "auroc",
    "brier",
    "calibrated_level",
    "confusion",
    "ece",
    "ece_debiased",
    "error_auroc",
    "holm",
    "is_right",
    "nll",
    "paired_bootstrap",
    "precision_recall_f1",
    "reliability",
    "risk_coverage",
    "shift_auroc",
    "summarise",
    "uncertainty",
]
