"""Questions with fixed options: public tasks, the user's own files, and the prompts they become.

A row is one `Question`; a `Task` holds the rows to train on, to choose on and to evaluate on.
"""

from bayestune.data.answer_readings import AnswerIs
from bayestune.data.column_roles import checked_columns, plain_name
from bayestune.data.digests import digest
from bayestune.data.files import (
    SortedRows,
    load_rows,
    read_rows,
    read_rows_and_answers,
    sort_rows,
)
from bayestune.data.option_lists import checked_options
from bayestune.data.own_prompts import OwnPrompt, refuse_unshown
from bayestune.data.prompts import Prompt
from bayestune.data.public_tasks import TASKS, load_split, load_task, prompt_of
from bayestune.data.questions import Question, Scoring, rows_digest
from bayestune.data.read_options import ReadOptions
from bayestune.data.tasks import Part, Task, check_ids, check_trainable, own_task, with_unlabelled

__all__ = [
    "TASKS",
    "AnswerIs",
    "OwnPrompt",
    "Part",
    "Prompt",
    "Question",
    "ReadOptions",
    "Scoring",
    "SortedRows",
    "Task",
    "check_ids",
    "check_trainable",
    "checked_columns",
    "checked_options",
    "digest",
    "load_rows",
    "load_split",
    "load_task",
    "own_task",
    "plain_name",
    "prompt_of",
    "read_rows",
    "read_rows_and_answers",
    "refuse_unshown",
    "rows_digest",
    "sort_rows",
    "with_unlabelled",
]
