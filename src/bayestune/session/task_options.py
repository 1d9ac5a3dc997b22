"""Which questions a session is about, and how they are put."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bayestune.data import (
    TASKS,
    AnswerIs,
    Question,
    Scoring,
    Task,
    checked_options,
    load_rows,
    load_task,
    own_task,
    with_unlabelled,
)
from bayestune.errors import COUNT, NUMBER, PART, SEED, Refusal, check_fields

logger = logging.getLogger(__name__)

DEFAULT_TASK = "everyday"

# What a fit settles, whichever rows its posterior is evaluated on.
OF_THE_FIT = ("data", "scoring", "max_length", "holdout", "train_rows")
OF_THE_FIT += ("unlabelled_data", "unlabelled_rows")


@dataclass(frozen=True)
class TaskOptions:
    """Which questions, and how they are put.

    Args:
        task: a task of the table, instead of rows of your own; left out, a fit takes "everyday".
        data_root: a directory in the Hub's layout; None for the Hub.
        data: your own training rows, a JSONL, CSV or parquet file.
        evaluation_data: your own evaluation rows.
        options: the options of every row of your files that has none of its own.
        scoring: "letter" compares the answer tokens' logits, "text" the likelihoods of the options'
            texts.
        max_length: tokens of a prompt.
        holdout: the part of train held out for choosing anything.
        train_rows: use at most so many training rows.
        evaluation_rows: use at most so many evaluation rows.
        subset_seed: of the choice of rows.
        evaluation_seed: of the choice of evaluation rows, where not `subset_seed`.
        unlabelled_data: your own rows without answers, for `distilled` to learn on.
        unlabelled_rows: so many further rows of train lose their answers for that.
        answer_is: what answers are in your files, "index" (from 0), "letter" or "text"; left out,
            the reading that all rows of a file agree with.
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

    def __post_init__(self) -> None:
        if self.options:
            checked_options(self.options, f"options={list(self.options)}")
        check_fields(self, max_length=COUNT, train_rows=COUNT, evaluation_rows=COUNT)
        check_fields(self, holdout=PART, subset_seed=SEED, evaluation_seed=SEED)
        check_fields(self, unlabelled_rows=NUMBER)

    def load(self, *, labelled: bool = True, otherwise: tuple[str, ...] = ()) -> Task:
        """The task with its rows chosen; `evaluation_data` may lack answers if not `labelled`.

        Rows of files that have no options, neither of their own nor in `options`, have `otherwise`.

        Raises:
            Refusal: if a task of the table is named beside files, or `options` without files.
        """
        given = self.data or self.evaluation_data
        if given and self.task in TASKS:
            raise Refusal(
                f"the rows are named twice: got the task {self.task!r} and the file {given}, "
                "expected one of them; leave out the other"
            )
        if self.options and not given:
            raise Refusal(
                f"options are for rows of your own: got {list(self.options)} without a file, "
                "expected data or evaluation_data; give one"
            )
        if not given:
            if self.task is None:
                said = "no rows were named: taking the embedded questions %r; yours go in --data"
                logger.info(said, self.named)
            task = load_task(self.named, self.data_root)
        else:
            train = self._rows(self.data, otherwise)
            test = self._rows(self.evaluation_data, otherwise, labelled=labelled)
            task = own_task(Path(given).stem, train, test)
        if self.unlabelled_data:
            spare = self._rows(self.unlabelled_data, otherwise, labelled=False)
            task = with_unlabelled(task, spare)
        fixed = self.evaluation_seed
        seed = self.subset_seed
        test = task.subset(evaluation=self.evaluation_rows, seed=seed if fixed is None else fixed)
        chosen = task.subset(self.train_rows, None, self.holdout, seed, self.unlabelled_rows)
        return replace(chosen, evaluation=test.evaluation)

    @property
    def named(self) -> str:
        """The task of the table, where there are no rows of one's own."""
        return self.task or DEFAULT_TASK

    def _rows(
        self, file: Path | None, otherwise: tuple[str, ...], *, labelled: bool = True
    ) -> tuple[Question, ...]:
        if file is None:
            return ()
        read: dict[str, Any] = {"labelled": labelled, "answer_is": self.answer_is}
        return load_rows(file, self.options, otherwise=otherwise, **read)

    def recorded(self, fitted: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The options as records keep them: files by name, and what a fit settled as fitted."""
        found: dict[str, Any] = {}
        for name, value in asdict(self).items():
            found[name] = value.name if isinstance(value, Path) else value
        if not (self.data or self.evaluation_data):
            found["task"] = self.named
        settled = {name: value for name, value in (fitted or {}).items() if name in OF_THE_FIT}
        return {**found, **settled}
