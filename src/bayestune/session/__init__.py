"""A session: a model and the task it is asked, opened in one way by every command and grid cell.

It is opened by names, or from a posterior's folder with prompt, scoring and precision as fitted.
"""

from bayestune.session.artefact import Artefact, RowOptions, load_way, rows_of
from bayestune.session.as_fitted import (
    classes_of,
    in_order,
    of_its_classes,
    prompt_of_fit,
    put_as_fitted,
    rows_as_fitted,
    say_repeated,
    say_seen,
    usual_reading,
)
from bayestune.session.calibrated_predictor import CalibratedPredictor, decide, read_calibration
from bayestune.session.compared_ways import VariantOptions
from bayestune.session.fit import REPORT, Fit, details_of, read_report, shown
from bayestune.session.language_fit import LanguageFit
from bayestune.session.lesson import DistillationRows, Lesson
from bayestune.session.loaded_base import LoadedBase
from bayestune.session.opened_model import Dtype, num_classes, open_model
from bayestune.session.plain_adapter import details_if_any, is_plain, load_any, named_base
from bayestune.session.prediction_options import PredictionOptions, joined
from bayestune.session.row_predictor import (
    DISTANCE,
    PROMPT_LENGTH,
    RowOutputs,
    RowPredictor,
    columns_joined,
    kept_reference,
    own_reference,
    prompt_lengths,
    windows,
)
from bayestune.session.session import Session
from bayestune.session.task_options import OF_THE_FIT, TaskOptions
from bayestune.session.with_labels import calibrate

__all__ = [
    "DISTANCE",
    "OF_THE_FIT",
    "PROMPT_LENGTH",
    "REPORT",
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
    "classes_of",
    "columns_joined",
    "decide",
    "details_if_any",
    "details_of",
    "in_order",
    "is_plain",
    "joined",
    "kept_reference",
    "load_any",
    "load_way",
    "named_base",
    "num_classes",
    "of_its_classes",
    "open_model",
    "own_reference",
    "prompt_lengths",
    "prompt_of_fit",
    "put_as_fitted",
    "read_calibration",
    "read_report",
    "rows_as_fitted",
    "rows_of",
    "say_repeated",
    "say_seen",
    "shown",
    "usual_reading",
    "windows",
]
