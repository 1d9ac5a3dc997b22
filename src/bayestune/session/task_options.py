"""Which questions a session is about, and how they are put."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bayestune.data import (
    TASKS,
    AnswerIs,
    OwnPrompt,
    Question,
    ReadOptions,
    Scoring,
    Task,
    checked_columns,
    checked_options,
    load_task,
    own_task,
    read_rows,
    read_rows_and_answers,
    refuse_unshown,
    with_unlabelled,
)
from bayestune.errors import COUNT, NUMBER, PART, SEED, Refusal, check_fields

logger = logging.getLogger(__name__)

DEFAULT_TASK = "everyday"

# What a fit settles, whichever rows its posterior is evaluated on.
SETTLED_BY_FIT = ("data", "scoring", "max_length", "holdout", "train_rows")
SETTLED_BY_FIT += ("unlabelled_data", "unlabelled_rows", "prompt", "chat", "system")

# Options of later versions: left out of records and folders unless they are given.
_LATER = ("prompt", "chat", "system", "columns")


@dataclass(frozen=True)
class TaskOptions:
    """Which questions, and how they are put.

    Args:
        task: a public task such as "arc_easy"; without it and files, the embedded "everyday".
        data_root: a directory that holds public tasks as the Hub does; None for the Hub.
        data: your own training rows, a JSONL, CSV or parquet file.
        evaluation_data: your own evaluation rows.
        options: the options of every row of your files that has none of its own.
        scoring: "letter" compares the answer tokens' logits, "text" the likelihoods of the options'
            texts, "head" the logits of a classification head.
        max_length: the most tokens of a prompt.
        holdout: the part of train that is set aside, to choose settings or a temperature on.
        train_rows: use at most so many training rows.
        evaluation_rows: use at most so many evaluation rows.
        subset_seed: of the random choice of rows.
        evaluation_seed: of the choice of evaluation rows, where not `subset_seed`.
        unlabelled_data: your own rows without answers, for `distilled` to learn on.
        unlabelled_rows: for that, so many further rows of train, without their answers.
        answer_is: what answers are in your files, "index" (from 0), "letter" or "text"; left out,
            the reading that all rows of a file agree with.
        columns: your files' own names, as question=subject,context=body,answer=queue.
        prompt: a file with your own template of {question}, {choices}, {context}.
        chat: whether prompts go through the model's chat template; left out: where they must.
        system: the system message of a chat.
    """

    task: str | None = None
    data_root: Path | None = None
    data: Path | None = None
    evaluation_data: Path | None = None
    options: tuple[str, ...] = ()
    scoring: Scoring = "letter"
    max_length: int = 300
    holdout: float = 0.0
    train_rows: int | None = None
    evaluation_rows: int | None = None
    subset_seed: int = 0
    evaluation_seed: int | None = None
    unlabelled_data: Path | None = None
    unlabelled_rows: int = 0
    answer_is: AnswerIs | None = None
    columns: dict[str, str] = field(default_factory=dict)
    prompt: Path | None = None
    chat: bool | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        if self.options:
            checked_options(self.options, f"options={list(self.options)}")
        check_fields(self, max_length=COUNT, train_rows=COUNT, evaluation_rows=COUNT)
        check_fields(self, holdout=PART, subset_seed=SEED, evaluation_seed=SEED)
        check_fields(self, unlabelled_rows=NUMBER)
        checked_columns(self.columns)
        self.own_prompt()  # refuses what does not go together

    def own_prompt(self) -> OwnPrompt:
        """The options about the prompt."""
        return OwnPrompt(self.prompt, self.chat, self.system)

    def load(self, *, labelled: bool = True, usual: ReadOptions | None = None) -> Task:
        """Reads the task and chooses its rows.

        If no training row of a file has options, the different answers become the options of all
        its rows, and of the rows without options in the other files.

        Args:
            labelled: whether the rows of `evaluation_data` must have answers.
            usual: how files are read where the options here do not say, as those of a fit.

        Raises:
            Refusal: if a task of the table is named beside files, or `options` without files; if
                the rows and the prompt do not go together.
        """
        self._check_named()
        usual = usual or ReadOptions()
        if self._file is None:
            if self.task is None:
                notice = "no rows were named: taking the embedded questions %r; yours go in --data"
                logger.info(notice, self.named)
            task = load_task(self.named, self.data_root)
        else:
            train, answer_is = self._training_rows(replace(usual, from_answers=True))
            task = own_task(self._file.stem, train, ())
            usual = replace(usual, otherwise=task.shared_options or usual.otherwise)
            usual = replace(usual, usual_answer_is=answer_is or usual.usual_answer_is)
            evaluation = self._rows(self.evaluation_data, usual, labelled=labelled)
            task = replace(own_task(task.name, train, evaluation), answer_is=answer_is)
        rows = (*task.train, *task.evaluation)
        task = replace(task, prompt=self.own_prompt().of(task.prompt, rows, self.scoring))
        if self.unlabelled_data:
            unlabelled = self._rows(self.unlabelled_data, usual, labelled=None)
            task = with_unlabelled(task, unlabelled)
            refuse_unshown(task.prompt, task.unlabelled, self.scoring)
        seed = self.subset_seed
        evaluation_seed = seed if self.evaluation_seed is None else self.evaluation_seed
        evaluated = task.subset(evaluation=self.evaluation_rows, seed=evaluation_seed)
        fitted = task.subset(self.train_rows, None, self.holdout, seed, self.unlabelled_rows)
        return replace(fitted, evaluation=evaluated.evaluation)

    @property
    def _file(self) -> Path | None:
        """The user's file that names the task; None if the rows are a public task's."""
        file = self.data or self.evaluation_data
        return Path(file) if file else None

    def _check_named(self) -> None:
        """Refuses a task of the table beside a file, and options of files without a file."""
        file = self._file
        if file and self.task in TASKS:
            raise Refusal(
                f"the rows are named twice: got the task {self.task!r} and the file {file}, "
                "expected one of them; leave out the other"
            )
        for name in ("options", "columns"):
            if getattr(self, name) and not file:
                raise Refusal(
                    f"{name} are for rows of your own: got {getattr(self, name)} without a file, "
                    "expected data or evaluation_data; give one"
                )

    @property
    def named(self) -> str:
        """The name of the public task, for where there is no file of the user's own."""
        return self.task or DEFAULT_TASK

    def _rows(
        self, file: Path | None, usual: ReadOptions, *, labelled: bool | None = True
    ) -> tuple[Question, ...]:
        if file is None:
            return ()
        return read_rows(file, self._reading(usual), labelled=labelled)

    def _training_rows(self, usual: ReadOptions) -> tuple[tuple[Question, ...], AnswerIs | None]:
        if self.data is None:
            return (), None
        return read_rows_and_answers(self.data, self._reading(usual))

    def _reading(self, usual: ReadOptions) -> ReadOptions:
        return replace(usual, options=self.options, answer_is=self.answer_is, columns=self.columns)

    def recorded(self, fitted: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The options as records keep them, files by name.

        Args:
            fitted: the options of a fit, whose values stand for those that a fit settles.
        """
        kept: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if value or name not in _LATER:
                kept[name] = value.name if isinstance(value, Path) else value
        if self._file is None:
            kept["task"] = self.named
        settled = {name: value for name, value in (fitted or {}).items() if name in SETTLED_BY_FIT}
        return {**kept, **settled}
