"""A session: a model and the task it is asked, opened in one way by every command and grid cell.

It is opened by names, or from a posterior's folder with prompt, scoring and precision as fitted.
"""

from bayestune.session.as_fitted import of_its_classes, options_of, put_as_fitted, say_seen
from bayestune.session.fit import Fit, details_of, shown
from bayestune.session.opened_model import Dtype, num_classes, open_model
from bayestune.session.session import Session
from bayestune.session.task_options import OF_THE_FIT, TaskOptions

__all__ = [
    "OF_THE_FIT",
    "Dtype",
    "Fit",
    "Session",
    "TaskOptions",
    "details_of",
    "num_classes",
    "of_its_classes",
    "open_model",
    "options_of",
    "put_as_fitted",
    "say_seen",
    "shown",
]
