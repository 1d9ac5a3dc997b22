"""A session: a model and the task it is asked, opened in one way by every command and grid cell.

It is opened by names, or from a posterior's folder with prompt, scoring and precision as fitted.
"""

from bayestune.session.as_fitted import put_as_fitted, say_seen
from bayestune.session.fit import Fit, shown
from bayestune.session.session import Dtype, Session, num_classes, open_model
from bayestune.session.task_options import OF_THE_FIT, TaskOptions

__all__ = [
    "OF_THE_FIT",
    "Dtype",
    "Fit",
    "Session",
    "TaskOptions",
    "num_classes",
    "open_model",
    "put_as_fitted",
    "say_seen",
    "shown",
]
