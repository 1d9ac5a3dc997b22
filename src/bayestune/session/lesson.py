"""A posterior's folder opened to teach a student: on which rows, and what the student's keeps."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from bayestune.adapters import detach
from bayestune.data import (
    AnswerIs,
    Question,
    Task,
    checked_columns,
    read_rows,
    with_unlabelled,
)
from bayestune.errors import NUMBER, Refusal, check_fields
from bayestune.methods import Distilled, changed
from bayestune.posteriors import artefact_folder, posterior_digest
from bayestune.scoring import check_lengths
from bayestune.session.as_fitted import prompt_of_fit, read_options_of_fit, seen_fingerprints
from bayestune.session.fit import Fit, details_of
from bayestune.session.loaded_base import LoadedBase
from bayestune.session.session import Session
from bayestune.session.task_options import TaskOptions
from bayestune.training import Training

# Details that a student's folder takes over from its teacher's.
_AS_TAUGHT = ("task", "scoring", "classes", "class_names", "dtype", "max_length", "train_rows")

# Options of the fit that are left out when its training rows are read again: they are about other
# rows, name files that may have moved, or say what the folder's prompt holds.
_NOT_AGAIN = ("evaluation_data", "evaluation_rows", "unlabelled_data", "data", "data_root")
_NOT_AGAIN += ("options", "columns", "prompt", "chat", "system")


@dataclass(frozen=True)
class DistillationRows:
    """Which rows a student learns from; left out, those that the posterior was trained on.

    Args:
        unlabelled: a JSONL, CSV or parquet file of rows; answers are not looked at.
        options: the options of every row of the files that has none of its own.
        data: the posterior's training rows, where they were your own.
        data_root: a directory in the Hub's layout with its task, where that is not embedded; None
            for the Hub.
        unlabelled_rows: so many further rows of the posterior's train set; left out, as many as its
            fit had set aside.
        answer_is: what answers are in `data`, where that was said when the posterior was fitted.
        columns: the file's own names, as question=subject,context=body; left out, those of the fit
            where the file has them.
    """

    unlabelled: Path | None = None
    options: tuple[str, ...] = ()
    data: Path | None = None
    data_root: Path | None = None
    unlabelled_rows: int | None = None
    answer_is: AnswerIs | None = None
    columns: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, unlabelled_rows=NUMBER)
        checked_columns(self.columns)

    def task(self, details: Mapping[str, Any], *, labelled: bool) -> Task:
        """The rows as a task under the fit's prompt, training rows among them where needed.

        Args:
            details: what the posterior's folder says.
            labelled: whether its training rows are needed beside unlabelled ones.

        Raises:
            Refusal: if the training rows are needed and cannot be had again, or a row cannot be
                read or put.
        """
        prompt = prompt_of_fit(details)
        if self.unlabelled is None or labelled or self.unlabelled_rows:
            task = replace(self._trained_on(details), prompt=prompt)
        else:
            task = Task(details["task"]["name"], (), (), prompt=prompt)
        if self.unlabelled is None:
            return task
        usual = read_options_of_fit(details)
        reading = replace(usual, options=tuple(self.options), columns=self.columns)
        rows = read_rows(self.unlabelled, reading, labelled=None)
        further = task.unlabelled if self.unlabelled_rows else ()
        return replace(task, unlabelled=(*further, *with_unlabelled(task, rows).unlabelled))

    def _trained_on(self, details: Mapping[str, Any]) -> Task:
        """The posterior's training rows, and as unlabelled ones those that its fit had set aside.

        Raises:
            Refusal: if the folder does not say which rows these are, or other rows are found.
        """
        advice = "give rows in --unlabelled; their answers are not needed"
        questions = details.get("questions")
        if questions is None or "seen" not in details:
            got = "a posterior that does not say which rows it was trained on"
            raise Refusal(f"got {got}; expected that, or other rows; {advice}")
        if questions.get("data") and self.data is None:
            got = f"a posterior that was trained on the rows of {questions['data']}"
            raise Refusal(f"got {got}; expected these rows or others; give --data, or {advice}")
        task = replace(self._options(questions).load(), evaluation=(), held_out=())
        rows = task.train
        seen = seen_fingerprints(details, len(rows[0].fingerprint)) if rows else set()
        if len(rows) != details["train_rows"] or not {row.fingerprint for row in rows} <= seen:
            got = f"{len(rows)} training rows, which are not those of the posterior"
            wanted = f"its {details['train_rows']}"
            raise Refusal(f"got {got}; expected {wanted}; give the same file, or {advice}")
        return task

    def _options(self, questions: Mapping[str, Any]) -> TaskOptions:
        """How the fit chose its rows, with files where they are now.

        Args:
            questions: the fit's own options, as its folder keeps them.
        """
        names = {field.name for field in fields(TaskOptions)} - {*_NOT_AGAIN}
        options = {name: value for name, value in questions.items() if name in names}
        if self.data is not None:
            options["task"] = None
            options["data"] = self.data
            options["options"] = tuple(self.options or questions.get("options") or ())
            options["columns"] = self.columns or questions.get("columns") or {}
        if self.answer_is is not None:
            options["answer_is"] = self.answer_is
        if self.unlabelled_rows is not None:
            options["unlabelled_rows"] = self.unlabelled_rows
        return TaskOptions(data_root=self.data_root, **options)


@dataclass(frozen=True)
class Lesson:
    """A posterior's folder, opened to teach a student on some rows.

    Args:
        folder: the posterior's.
        details: what it says of its fit.
        session: the base model, and the rows as they are put to it.
        method: how the student is taught.
    """

    folder: Path
    details: Mapping[str, Any]
    session: Session
    method: Distilled

    @classmethod
    def open(
        cls, folder: Path, rows: DistillationRows, method: Distilled, model: str | None = None
    ) -> Self:
        """Loads the rows, then the base model.

        Args:
            folder: of the posterior, here or on the Hub.
            rows: which rows the student learns from.
            method: how it is taught.
            model: name of the base model, where it has moved.

        Raises:
            Refusal: if the rows cannot be had, or put as those of the fit, or the model is not the
                one that was fitted on.
        """
        place = artefact_folder(folder)
        details = details_of(place)
        task = rows.task(details, labelled=method.labelled)
        options = TaskOptions(unlabelled_data=rows.unlabelled)
        session = Session.as_fitted(details, task, options, model)
        lesson = cls(place, details, session, method)
        to_ask = lesson.rows
        check_lengths(session.loaded.model, to_ask, session.quietly().scorer.encode(to_ask))
        detach(session.load(place).posterior.model)  # refused now if it is of another base
        return lesson

    @property
    def rows(self) -> tuple[Question, ...]:
        """What the teacher may be asked about, without answers."""
        return self.method.offered(self.session.scorer)

    def training(self, training: Training, bf16: bool | None = None) -> Training:
        """The training of the student: steps and rate of the method, the adapter of the fit.

        Args:
            training: whatever else is asked for.
            bf16: whether to train under bfloat16 autocast; None for as the posterior was fitted.
        """
        of_fit = self.details["training"]
        return replace(
            training,
            lora=changed(training.lora, of_fit.get("lora") or {}),
            bf16=bool(of_fit["bf16"]) if bf16 is None else bf16,
            steps=self.method.steps,
            learning_rate=self.method.learning_rate,
        )

    def student(self, training: Training, output: Path) -> Fit:
        """Asks the posterior, trains the student, and saves it with what a later command needs.

        Args:
            training: of the student; with `resume` it goes on where a run was interrupted.
            output: folder of the student, with its checkpoints.
        """
        with_output = replace(training, output=output / "checkpoints")
        method: Any = replace(self.method, base=LoadedBase(self.session, self.folder))
        student = method.fit(self.session.loaded.model, self.session.scorer, with_output)
        fit = Fit.of(student, self._details(training))
        fit.save(output)
        return fit

    def _details(self, training: Training) -> dict[str, Any]:
        """What the student's folder says of it; it has seen its own rows and its teacher's."""
        as_taught = {name: self.details[name] for name in _AS_TAUGHT if name in self.details}
        settings = {field.name: getattr(self.method, field.name) for field in fields(self.method)}
        settings["base"] = self.details["fields"]
        learnt = self.method.rows(self.session.scorer, training)
        size = len(learnt[0].fingerprint)
        seen = seen_fingerprints(self.details, size) | {row.fingerprint for row in learnt}
        file = self.session.options.unlabelled_data
        unlabelled = {"unlabelled_data": file.name if file else None}
        return {
            **as_taught,
            "method": "distilled",
            "fields": {"method": "distilled", **settings},
            "base_model": self.session.loaded.name,
            "training": asdict(training),
            "questions": {**self.details.get("questions", {}), **unlabelled},
            "seen": "".join(sorted(seen)),
        }

    @property
    def digest(self) -> str:
        """The digest of the posterior's folder."""
        return posterior_digest(self.folder)
