"""What a posterior's folder teaches a student: its rows, and the student's own folder."""

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
from bayestune.session.as_fitted import (
    fingerprints,
    prompt_of_fit,
    seen_fingerprints,
    usual_reading,
)
from bayestune.session.fit import Fit, details_of
from bayestune.session.loaded_base import LoadedBase
from bayestune.session.session import Session
from bayestune.session.task_options import TaskOptions
from bayestune.training import Training

# What a student's folder says as its teacher's does.
_AS_TAUGHT = ("task", "scoring", "classes", "class_names", "dtype", "max_length", "train_rows")

# What a fit's rows are read again without: other files, and a prompt that its folder holds.
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
        own = {"options": tuple(self.options), "columns": self.columns}
        reading = replace(usual_reading(details), **own)
        rows = read_rows(self.unlabelled, reading, labelled=None)
        spare = task.unlabelled if self.unlabelled_rows else ()
        return replace(task, unlabelled=(*spare, *with_unlabelled(task, rows).unlabelled))

    def _trained_on(self, details: Mapping[str, Any]) -> Task:
        """The posterior's training rows, and those that its fit had set aside."""
        advice = "give rows in --unlabelled; their answers are not needed"
        chosen = details.get("questions")
        if chosen is None or "seen" not in details:
            got = "a posterior that does not say which rows it was trained on"
            raise Refusal(f"got {got}; expected that, or other rows; {advice}")
        if chosen.get("data") and self.data is None:
            got = f"a posterior that was trained on the rows of {chosen['data']}"
            raise Refusal(f"got {got}; expected these rows or others; give --data, or {advice}")
        task = replace(self._options(chosen).load(), evaluation=(), held_out=())
        rows = task.train
        known = seen_fingerprints(details, len(rows[0].fingerprint)) if rows else set()
        if len(rows) != details["train_rows"] or not {row.fingerprint for row in rows} <= known:
            got = f"{len(rows)} training rows, which are not those of the posterior"
            wanted = f"its {details['train_rows']}"
            raise Refusal(f"got {got}; expected {wanted}; give the same file, or {advice}")
        return task

    def _options(self, chosen: Mapping[str, Any]) -> TaskOptions:
        """How the fit chose its rows, with files where they are now."""
        names = {field.name for field in fields(TaskOptions)}
        kept = {name: value for name, value in chosen.items() if name in names}
        for name in _NOT_AGAIN:
            kept.pop(name, None)
        if self.data is not None:
            options = tuple(self.options or chosen.get("options") or ())
            columns = self.columns or chosen.get("columns") or {}
            kept |= {"task": None, "data": self.data, "options": options, "columns": columns}
        if self.answer_is is not None:
            kept["answer_is"] = self.answer_is
        if self.unlabelled_rows is not None:
            kept["unlabelled_rows"] = self.unlabelled_rows
        return TaskOptions(data_root=self.data_root, **kept)


@dataclass(frozen=True)
class Lesson:
    """A posterior's folder, opened to teach a student on some rows."""

    folder: Path
    details: Mapping[str, Any]
    session: Session
    method: Distilled

    @classmethod
    def open(
        cls, folder: Path, rows: DistillationRows, method: Distilled, model: str | None = None
    ) -> Self:
        """Loads the rows, then the base model; `model` is its name where it has moved.

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
        asked = lesson.rows
        check_lengths(session.loaded.model, asked, session.quietly().scorer.encode(asked))
        detach(session.load(place).posterior.model)  # refused now if it is of another base
        return lesson

    @property
    def rows(self) -> tuple[Question, ...]:
        """What the teacher may be asked about, without answers."""
        return self.method.offered(self.session.scorer)

    def training(self, training: Training, bf16: bool | None = None) -> Training:
        """A training with the adapter of the posterior's fit, and its precision unless given."""
        fitted = self.details["training"]
        lora = changed(training.lora, fitted.get("lora") or {})
        precise = bool(fitted["bf16"]) if bf16 is None else bf16
        own = {"steps": self.method.steps, "learning_rate": self.method.learning_rate}
        return replace(training, lora=lora, bf16=precise, **own)

    def student(self, training: Training, output: Path) -> Fit:
        """Asks the posterior, trains the student, and saves it with what a later command needs.

        With `training.resume` it goes on where an earlier run was interrupted.
        """
        here = replace(training, output=output / "checkpoints")
        taught: Any = replace(self.method, base=LoadedBase(self.session, self.folder))
        student = taught.fit(self.session.loaded.model, self.session.scorer, here)
        fit = Fit.of(student, self._details(training))
        fit.save(output)
        return fit

    def _details(self, training: Training) -> dict[str, Any]:
        kept = {name: self.details[name] for name in _AS_TAUGHT if name in self.details}
        own = {field.name: getattr(self.method, field.name) for field in fields(self.method)}
        own["base"] = self.details["fields"]
        learnt = self.method.rows(self.session.scorer, training)
        size = len(learnt[0].fingerprint)
        seen = seen_fingerprints(self.details, size) | seen_fingerprints(
            {"seen": fingerprints(learnt)}, size
        )
        file = self.session.options.unlabelled_data
        asked = {"unlabelled_data": file.name if file else None}
        return {
            **kept,
            "method": "distilled",
            "fields": {"method": "distilled", **own},
            "base_model": self.session.loaded.name,
            "training": asdict(training),
            "questions": {**self.details.get("questions", {}), **asked},
            "seen": "".join(sorted(seen)),
        }

    @property
    def digest(self) -> str:
        """Of the posterior's folder."""
        return posterior_digest(self.folder)
