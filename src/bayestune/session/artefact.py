"""Opens what is calibrated and decides: a posterior's folder, or any plain LoRA adapter's."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Self

from bayestune.adapters import detach
from bayestune.data import (
    AnswerIs,
    OwnPrompt,
    Question,
    ReadOptions,
    Scoring,
    check_ids,
    checked_columns,
    own_task,
    prompt_of,
    read_rows,
)
from bayestune.decisions import Distance
from bayestune.errors import Refusal
from bayestune.posteriors import (
    artefact_folder,
    load_adapter,
    posterior_digest,
)
from bayestune.session.as_fitted import read_options_of_fit
from bayestune.session.fit import Fit, details_of
from bayestune.session.opened_model import Dtype, num_classes, open_model
from bayestune.session.plain_adapter import is_plain, name_of_base, told_details
from bayestune.session.prediction_options import PredictionOptions
from bayestune.session.row_predictor import RowPredictor
from bayestune.session.session import Session
from bayestune.session.task_options import TaskOptions

Rows = Path | str | Sequence[Question]


@dataclass(frozen=True)
class RowOptions:
    """How rows are read, and how they are put to a plain adapter: a posterior knows that itself.

    Args:
        task: a public task, for its prompt; of a plain adapter.
        scoring: "letter", "text" or "head", as `fit` explains; of a plain adapter.
        max_length: the most tokens of a prompt; of a plain adapter.
        dtype: of the base model's weights; of a plain adapter.
        options: the options of every row that has none of its own.
        answer_is: what answers are, "index", "letter" or "text"; left out, as all rows agree.
        unsure: the option that means "I do not know", where there is one: it is never acted on.
        trained_on: the rows that training saw: distances from them become a score, and held-out
            rows among them are refused where the folder does not say which they are.
        columns: the files' own names, as question=subject,answer=queue; left out, as in the fit, or
            the known names.
        prompt: a file with your own template, as `fit` explains; of a plain adapter.
        chat: whether prompts go through the model's chat template; of a plain adapter.
        system: the system message of a chat; of a plain adapter.
    """

    task: str | None = None
    scoring: Scoring = "letter"
    max_length: int = 300
    dtype: Dtype = "float32"
    options: tuple[str, ...] = ()
    answer_is: AnswerIs | None = None
    unsure: str | None = None
    trained_on: Path | None = None
    columns: dict[str, str] = field(default_factory=dict)
    prompt: Path | None = None
    chat: bool | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        checked_columns(self.columns)
        OwnPrompt(self.prompt, self.chat, self.system)  # refuses what does not go together

    def task_options(self) -> TaskOptions:
        """How rows are put to a plain adapter, as the options of a fit."""
        names = ("scoring", "max_length", "options", "columns", "prompt", "chat", "system")
        return TaskOptions(**{name: getattr(self, name) for name in names})

    def reading(self, place: Path) -> ReadOptions:
        """How files of rows are read for the artefact in a folder."""
        usual = ReadOptions() if is_plain(place) else read_options_of_fit(details_of(place))
        return replace(usual, options=self.options, answer_is=self.answer_is, columns=self.columns)

    def check(self, place: Path, *, calibrated: bool = False) -> None:
        """Refuses options that the fit of a posterior, or the calibration of an adapter, settled.

        Args:
            place: the folder.
            calibrated: whether what it holds has a calibration that is to be applied.
        """
        if is_plain(place) and not calibrated:
            return
        settled = ["task", "scoring", "max_length", "dtype", "prompt", "chat", "system"]
        if is_plain(place):
            settled.append("options")
            what = "a calibrated adapter"
            how = "its calibration says"
        else:
            what = "a posterior"
            how = "they were in its fit"
        defaults = {each.name: each.default for each in fields(self)}
        given = [name for name in settled if getattr(self, name) != defaults[name]]
        if given:
            raise Refusal(
                f"got --{given[0]} for {what}; expected a plain adapter: rows are put to {what} as "
                f"{how}; leave it out"
            )


@dataclass(frozen=True)
class Artefact:
    """What a folder holds, a posterior or a plain adapter, opened to predict some rows.

    Args:
        place: the folder.
        session: the base model, and the rows as they are put to it.
        fit: the posterior, or a plain adapter as a point.
    """

    place: Path
    session: Session
    fit: Fit

    @classmethod
    def open(
        cls,
        folder: Path | str,
        rows: Sequence[Question],
        row_options: RowOptions | None = None,
        model: str | None = None,
        way: PredictionOptions | None = None,
    ) -> Self:
        """Loads what predicts: the artefact, or the student in its place.

        Args:
            folder: of `fit`, or an adapter's.
            rows: that it shall predict.
            row_options: how they are put to a plain adapter; None for as its calibration says.
            model: the base model, where it has moved, or where the adapter does not name it.
            way: how to predict; a student in it is loaded in the artefact's place.

        Raises:
            Refusal: if neither the folder nor `row_options` says how rows are put.
        """
        place = artefact_folder(folder)
        if row_options is not None and is_plain(place):
            return cls._plain(place, rows, row_options, model)
        details = details_of(place)
        task = own_task("rows", (), rows)
        session = Session.as_fitted(details, task, TaskOptions(), model)
        return cls(place, session, load_way(session, place, way))

    @classmethod
    def _plain(
        cls, place: Path, rows: Sequence[Question], row_options: RowOptions, model: str | None
    ) -> Self:
        name = name_of_base(place, {}, model)
        task = own_task("rows", (), rows)
        if row_options.task is not None:
            task = replace(task, prompt=prompt_of(row_options.task))
        options = row_options.task_options()
        prompt = options.own_prompt().of(task.prompt, rows, row_options.scoring)
        task = replace(task, prompt=prompt)
        loaded = open_model(name, row_options.dtype, num_classes(task, options.scoring))
        session = Session.of(loaded, task, options)
        details = told_details(loaded.name, session.task, options, row_options.dtype)
        posterior = load_adapter(loaded.model, place, session.scorer)
        return cls(place, session, Fit.of(posterior, details))

    @property
    def rows(self) -> tuple[Question, ...]:
        """The rows that it was opened for, as they are put."""
        return self.session.task.evaluation

    def predictor(self, way: PredictionOptions, reference: Distance | None = None) -> RowPredictor:
        """Predicts its rows in a way, and any others that are put as they are."""
        return RowPredictor(self.fit, way, self.session.quietly().scorer, reference)

    def student(self, folder: Path) -> Self:
        """The same with the student in `folder` loaded; what was loaded is taken off the model."""
        detach(self.fit.posterior.model)
        session = self.session
        point = load_adapter(session.loaded.model, folder, session.scorer)
        return replace(self, fit=replace(self.fit, posterior=point))


def load_way(
    session: Session, place: Path, way: PredictionOptions | None = None, bf16: bool | None = None
) -> Fit:
    """Loads what a way of predicting needs: what a folder holds, the student, or both in a cascade.

    Args:
        session: with the base model.
        place: the folder of the artefact.
        way: the way; None for the artefact itself.
        bf16: whether to predict under bfloat16 autocast; None for as fitted.

    Raises:
        Refusal: if the student is gone, or another one than was calibrated.
    """
    if way is None or way.student is None:
        return session.load(place, bf16)
    folder = (place / way.student).resolve()
    remedy = "put it back, or run `bayestune calibrate` again"
    if not folder.is_dir():
        got = f"a calibration that predicts with the student in {folder}"
        raise Refusal(f"got {got}; expected it there: it was moved; {remedy}")
    if posterior_digest(folder) != way.student_digest:
        got = f"another student in {folder} than the one calibrated"
        raise Refusal(f"got {got}; expected that one: it was trained again; {remedy}")
    if way.band is not None:  # a cascade: the student on a second base model, beside the artefact
        second_base = session.loaded.again().model
        student = load_adapter(second_base, folder, session.scorer)
        return replace(session.load(place, bf16), first=student)
    point = load_adapter(session.loaded.model, folder, session.scorer)
    return Fit.of(point, details_of(place), bf16)


def rows_for_artefact(
    rows: Rows,
    folder: Path | str,
    row_options: RowOptions | None = None,
    *,
    labelled: bool,
    columns: Mapping[str, str] | None = None,
) -> tuple[Question, ...]:
    """Rows that are given, or read from a file; those without options have the fit's.

    Args:
        rows: questions, or a file of them.
        folder: of the artefact that they are for.
        row_options: how they are read; None for what the artefact or its calibration says.
        labelled: whether each must have an answer.
        columns: the file's own names, before those of the artefact.

    Raises:
        Refusal: if some cannot be read, lack an answer that is needed, or share an id.
    """
    if isinstance(rows, str | Path):
        place = artefact_folder(folder)
        reading = (
            row_options.reading(place) if row_options else read_options_of_fit(details_of(place))
        )
        reading = replace(reading, columns=columns or reading.columns)
        rows = read_rows(Path(rows), reading, labelled=labelled or None)
    questions = tuple(rows)
    if not questions:
        raise Refusal("got no rows; expected one or more; give a file or questions")
    unlabelled = [row.id for row in questions if row.answer is None]
    if labelled and unlabelled:
        got = f"{len(unlabelled)} of {len(questions)} rows without an answer"
        got = f"{got}, such as {unlabelled[0]}"
        raise Refusal(f"got {got}; expected labelled rows; add the answers or take them out")
    check_ids(questions)
    return questions


def content_of(row: Question) -> str:
    """A row's content as one text, by which calibration and prediction know the same row."""
    return "\n".join(row.content)


def unsure_options(rows: Iterable[Question], text: str | None) -> list[int] | None:
    """Index of each row's option that means "I do not know"; −1 in rows without one.

    Args:
        rows: whose options.
        text: of that option, whatever its case; None if the data has no such option.

    Returns:
        One index a row; None if `text` is None.
    """
    if text is None:
        return None
    wanted = text.strip().casefold()
    indices = []
    for row in rows:
        texts = [option.strip().casefold() for option in row.options]
        indices.append(texts.index(wanted) if wanted in texts else -1)
    return indices
