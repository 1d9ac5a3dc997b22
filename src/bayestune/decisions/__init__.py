"""From draws to decisions: functions of logits (S, N, C) and labels that know nothing of models.

`calibrate` chooses on held-out rows how to predict and when to act, `decide` applies it; beside
them are what they are made of: scores, thresholds with a promise, sets, a gate's figures, drift,
and which rows to label.
"""

from bayestune.decisions.bands import band_thresholds, class_thresholds
from bayestune.decisions.bounds import (
    Promise,
    binomial_p_value,
    bounded_loss_p_value,
    risk_bound,
    rows_for_rate,
    rows_needed,
    smallest_risk,
)
from bayestune.decisions.calibrating import calibrate, parts
from bayestune.decisions.calibration import FILE_NAME, Calibration, as_kept
from bayestune.decisions.calibration_options import CalibrationOptions
from bayestune.decisions.cascade import doubtful_band
from bayestune.decisions.comparing import HeldOut, Trial, Variant, compare, kept
from bayestune.decisions.costs import losses_of
from bayestune.decisions.deciding import Decision, decide
from bayestune.decisions.drift import Drift, drift_test, false_alarm_rate, permutations_for
from bayestune.decisions.features import Distance, shrunk_covariance, spread_out
from bayestune.decisions.gating import (
    ClassFigures,
    Gate,
    class_figures,
    free_baselines,
    gate,
    macro_f1,
)
from bayestune.decisions.rank import (
    Acquisition,
    check_ranking,
    rank_rows,
    ranked_lines,
    usual_acquisition,
)
from bayestune.decisions.row_scores import (
    ONE_PASS,
    OVER_DRAWS,
    ROW_SCORES,
    Spread,
    mutual_information,
    score_rows,
)
from bayestune.decisions.sets import SetKind, SetRule, fit_sets, option_scores, row_uniforms
from bayestune.decisions.tempering import (
    NotFiniteLogits,
    best_temperature,
    check_draws,
    log_predictive,
    predictive_nll,
)
from bayestune.decisions.thresholds import (
    Threshold,
    likely_start,
    threshold,
)

__all__ = [
    "FILE_NAME",
    "ONE_PASS",
    "OVER_DRAWS",
    "ROW_SCORES",
    "Acquisition",
    "Calibration",
    "CalibrationOptions",
    "ClassFigures",
    "Decision",
    "Distance",
    "Drift",
    "Gate",
    "HeldOut",
    "NotFiniteLogits",
    "Promise",
    "SetKind",
    "SetRule",
    "Spread",
    "Threshold",
    "Trial",
    "Variant",
    "as_kept",
    "band_thresholds",
    "best_temperature",
    "binomial_p_value",
    "bounded_loss_p_value",
    "calibrate",
    "check_draws",
    "check_ranking",
    "class_figures",
    "class_thresholds",
    "compare",
    "decide",
    "doubtful_band",
    "drift_test",
    "false_alarm_rate",
    "fit_sets",
    "free_baselines",
    "gate",
    "kept",
    "likely_start",
    "log_predictive",
    "losses_of",
    "macro_f1",
    "mutual_information",
    "option_scores",
    "parts",
    "permutations_for",
    "predictive_nll",
    "rank_rows",
    "ranked_lines",
    "risk_bound",
    "row_uniforms",
    "rows_for_rate",
    "rows_needed",
    "score_rows",
    "shrunk_covariance",
    "smallest_risk",
    "spread_out",
    "threshold",
    "usual_acquisition",
]
