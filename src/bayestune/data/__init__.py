"""Questions with fixed options: public tasks, the user's own files, and the prompts they become.

A row is one `Question`; a `Task` holds the rows to train on, to choose on and to evaluate on.
"""

from bayestune.data.files import load_rows
from bayestune.data.prompts import Prompt
from bayestune.data.questions import Question, Scoring
from bayestune.data.tasks import TASKS, Part, Task, check_trainable, load_task, own_task

__all__ = [
    "TASKS",
    "Part",
    "Prompt",
    "Question",
    "Scoring",
    "Task",
    "check_trainable",
    "load_rows",
    "load_task",
    "own_task",
]
