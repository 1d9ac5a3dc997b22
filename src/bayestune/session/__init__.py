"""A session: a model and the task it is asked, opened in one way by every command and grid cell.

It is opened by names, or from a posterior's folder with prompt, scoring and precision as fitted.
"""

from bayestune.session.artefact import Artefact, RowOptions, load_way, rows_for_artefact
from bayestune.session.as_fitted import (
    classes_of_fit,
    lines_of_all_rows,
    prompt_of_fit,
    read_options_of_fit,
    rows_as_fitted,
    task_as_fitted,
    warn_of_repeated_rows,
    warn_of_seen_rows,
    with_classes_of_fit,
)
from bayestune.session.calibrated_predictor import CalibratedPredictor, decide, read_calibration
from bayestune.session.compared_ways import VariantOptions
from bayestune.session.fit import REPORT_FILE, Fit, details_of, name_in_records, read_report
from bayestune.session.language_fit import LanguageFit
from bayestune.session.lesson import DistillationRows, Lesson
from bayestune.session.loaded_base import LoadedBase
from bayestune.session.opened_model import Dtype, num_classes, open_model
from bayestune.session.plain_adapter import (
    details_if_any,
    is_plain,
    load_posterior_or_adapter,
    name_of_base,
)
from bayestune.session.prediction_options import PredictionOptions, joined_logits, widened
from bayestune.session.row_predictor import (
    DISTANCE,
    PROMPT_LENGTH,
    RowOutputs,
    RowPredictor,
    joined_columns,
    kept_reference,
    prompt_lengths,
    reference_of_artefact,
    windows,
)
from bayestune.session.session import Session
from bayestune.session.task_options import SETTLED_BY_FIT, TaskOptions
from bayestune.session.with_labels import calibrate

__all__ = [
    "DISTANCE",
    "PROMPT_LENGTH",
    "REPORT_FILE",
    "SETTLED_BY_FIT",
    "Artefact",
    "CalibratedPredictor",
    "DistillationRows",
    "Dtype",
    "Fit",
    "LanguageFit",
    "Lesson",
    "LoadedBase",
    "PredictionOptions",
    "RowOptions",
    "RowOutputs",
    "RowPredictor",
    "Session",
    "TaskOptions",
    "VariantOptions",
    "calibrate",
    "classes_of_fit",
    "decide",
    "details_if_any",
    "details_of",
    "is_plain",
    "joined_columns",
    "joined_logits",
    "kept_reference",
    "lines_of_all_rows",
    "load_posterior_or_adapter",
    "load_way",
    "name_in_records",
    "name_of_base",
    "num_classes",
    "open_model",
    "prompt_lengths",
    "prompt_of_fit",
    "read_calibration",
    "read_options_of_fit",
    "read_report",
    "reference_of_artefact",
    "rows_as_fitted",
    "rows_for_artefact",
    "task_as_fitted",
    "warn_of_repeated_rows",
    "warn_of_seen_rows",
    "widened",
    "windows",
    "with_classes_of_fit",
]
