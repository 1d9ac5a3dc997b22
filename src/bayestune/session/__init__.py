"""A session: a model and the task it is asked, opened in one way by every command and grid cell.

It is opened by names, or from a posterior's folder with prompt, scoring and precision as fitted.
"""

from bayestune.session.artefact import Artefact, Put, load_way, rows_of
from bayestune.session.as_fitted import (
    classes_of,
    of_its_classes,
    options_of,
    put_as_fitted,
    rows_as_fitted,
    say_seen,
)
from bayestune.session.fit import Fit, details_of, shown
from bayestune.session.gated import Gated, decide, extra_scores, read_calibration
from bayestune.session.opened_model import Dtype, num_classes, open_model
from bayestune.session.prediction_ways import Way, joined
from bayestune.session.session import Session
from bayestune.session.task_options import OF_THE_FIT, TaskOptions
from bayestune.session.with_labels import Compared, calibrate

__all__ = [
    "OF_THE_FIT",
    "Artefact",
    "Compared",
    "Dtype",
    "Fit",
    "Gated",
    "Put",
    "Session",
    "TaskOptions",
    "Way",
    "calibrate",
    "classes_of",
    "decide",
    "details_of",
    "extra_scores",
    "joined",
    "load_way",
    "num_classes",
    "of_its_classes",
    "open_model",
    "options_of",
    "put_as_fitted",
    "read_calibration",
    "rows_as_fitted",
    "rows_of",
    "say_seen",
    "shown",
]
