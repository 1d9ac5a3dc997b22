"""Reads the user's own rows from files of the usual kinds."""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from bayestune.data.answer_classes import with_classes
from bayestune.data.answer_readings import AnswerIs, is_readable, right_options
from bayestune.data.column_roles import Columns, Fields, as_text, is_missing
from bayestune.data.conversations import read_conversation
from bayestune.data.drafts import Draft, draft_of, possible_options
from bayestune.data.file_kinds import given_rows
from bayestune.data.option_lists import checked_options
from bayestune.data.questions import Question
from bayestune.data.read_options import ReadOptions
from bayestune.errors import Refusal

logger = logging.getLogger(__name__)


def load_rows(
    path: str | PathLike[str],
    options: Sequence[str] = (),
    *,
    labelled: bool = True,
    answer_is: AnswerIs | None = None,
    otherwise: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
) -> tuple[Question, ...]:
    """Reads the user's own questions from a file.

    Columns: `question` (or `text`, which beside `question` is its context), or `messages`, a
    conversation whose last message by the user is the question; `options` (or `choices`), a list,
    in CSV a JSON list or texts joined by "|", or columns such as `option_a`, `option_b`; `answer`
    (or `label`); perhaps `id` and `context` (or `passage`). Others are named in a warning. An empty
    cell, null and NaN are the same: nothing.

    Args:
        path: `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet`, in UTF-8 or UTF-16, perhaps gzipped.
        options: of every row that has none of its own.
        labelled: whether every row must have an answer.
        answer_is: "index" (from 0), "letter" or "text"; None to find what all rows agree with.
        otherwise: the same as `options`, used if these are not given; no warning if no row needs
            them.
        columns: the file's own names, such as {"question": "subject", "answer": "queue"}.

    Returns:
        The questions. Ids that several rows share are told apart by numbers, with a warning.

    Raises:
        Refusal: if the file cannot be read, has no rows, a row lacks a column or has none of its
            options as its answer, or answers can be read in two ways; file and line are named.
        FileNotFoundError: if there is no such file.
    """
    reading = ReadOptions(tuple(options), tuple(otherwise), answer_is, columns=columns or {})
    return read_rows(Path(path), reading, labelled=labelled)


def read_rows(
    path: Path, reading: ReadOptions, *, labelled: bool | None = True
) -> tuple[Question, ...]:
    """Reads a file as `load_rows` does.

    Args:
        path: of the file.
        reading: how it is read.
        labelled: whether every row must have an answer; None to leave answers aside, so that all
            questions have none.
    """
    return read_rows_and_answers(path, reading, labelled=labelled)[0]


def read_rows_and_answers(
    path: Path, reading: ReadOptions, *, labelled: bool | None = True
) -> tuple[tuple[Question, ...], AnswerIs | None]:
    """The rows as `read_rows` reads them, and what `reading` says their answers are.

    That is "text" if the options were made of the answers, and None if it was found by trying.
    """
    file = _read(path, reading, bool(labelled))
    for problem in file.problems.values():
        raise problem
    if labelled is None:
        answers: list[int | None] = [None] * len(file.drafts)
    else:
        answers = file.answers(labelled=labelled)
    file.warn_of_unused(reading.options)
    return file.questions(answers), file.answer_is


@dataclass(frozen=True)
class SortedRows:
    """The rows of a file that can be read, and the others.

    Args:
        questions: those that can be read.
        problems: an id and what is wrong, for each row that cannot, by its number from 0.
    """

    questions: tuple[Question, ...]
    problems: dict[int, tuple[str, Refusal]]


def sort_rows(path: Path, reading: ReadOptions) -> SortedRows:
    """Reads rows that need no answers as `load_rows` does, but keeps bad rows apart from the good.

    Args:
        path: of the file.
        reading: how it is read.

    Raises:
        Refusal: if no row can be read, or the answers of those that can do not go together.
    """
    file = _read(path, reading, labelled=False)
    file.warn_of_unused(reading.options)
    try:
        answers = file.answers(labelled=False)
    except Refusal:
        file.take_out_bad_answers()
        answers = file.answers(labelled=False)
    if not file.drafts:
        raise next(iter(file.problems.values()))
    problems = {}
    for number in sorted(file.problems):
        problems[number] = (file.ids[number], file.problems[number])
    return SortedRows(file.questions(answers), problems)


@dataclass(frozen=True)
class _File:
    """A file's rows, by their numbers from 0, before it is known which options are right.

    Args:
        name: of the file.
        columns: what they stand for.
        ids: of all rows.
        drafts: the rows that can be read.
        problems: why the others cannot.
        answer_is: how answers are read, by the user's word or as classes; None to find it.
        usual: the reading that is tried first.
    """

    name: str
    columns: Columns
    ids: dict[int, str]
    drafts: dict[int, Draft]
    problems: dict[int, Refusal]
    answer_is: AnswerIs | None = None
    usual: AnswerIs | None = None

    def answers(self, *, labelled: bool) -> list[int | None]:
        """The right option of each row; None where there is no answer and none is needed."""
        return _answers(self.drafts.values(), labelled, self.answer_is, self.usual)

    def take_out_bad_answers(self) -> None:
        """Moves rows whose answers fit no reading from the drafts to the problems.

        If no reading then fits all other rows, also those that cannot be read by themselves.
        """
        self._take_out([n for n, draft in self.drafts.items() if not is_readable(draft.answered)])
        try:
            self.answers(labelled=False)
        except Refusal:
            self._take_out(list(self.drafts))

    def _take_out(self, numbers: Iterable[int]) -> None:
        """Moves those of these rows that cannot be read by themselves to the problems."""
        for number in numbers:
            try:
                _answers([self.drafts[number]], False, self.answer_is, self.usual)
            except Refusal as problem:
                self.problems[number] = problem
                del self.drafts[number]

    def warn_of_unused(self, options: Sequence[str]) -> None:
        """Warns if the options that the user gave for all rows are those of none."""
        in_rows = {frozenset(draft.answered.options) for draft in self.drafts.values()}
        if options and in_rows and frozenset(map(str.strip, options)) not in in_rows:
            logger.warning("%s: `options` are not used: every row has its own", self.name)

    def questions(self, answers: Sequence[int | None]) -> tuple[Question, ...]:
        """The questions with their answers; logs what is odd about ids and columns."""
        ids = _unique_ids(self.name, [self.ids[number] for number in self.drafts])
        self.columns.say()
        questions = []
        for key, draft, answer in zip(ids, self.drafts.values(), answers, strict=True):
            options = draft.answered.options
            question = Question(key, draft.question, options, answer, draft.context, draft.turns)
            questions.append(question)
        return tuple(questions)


def _read(path: Path, reading: ReadOptions, labelled: bool) -> _File:
    """The rows of a file, each read by itself; one that cannot be read is among the problems."""
    given = given_rows(path)
    if not given:
        raise Refusal(f"{path.name} is empty: expected at least one row; check the file")
    good = [row.cells for row in given if row.problem is None]
    columns = Columns(path.name, good, reading.names(path.name, good, labelled=labelled))
    file = _File(path.name, columns, ids={}, drafts={}, problems={})
    fields = {}
    for number, row in enumerate(given):
        file.ids[number] = str(row.cells.get("id") or row.key)
        try:
            if row.problem:
                raise row.problem
            fields[number] = _with_conversation(columns.fields(row.cells, row.place), row.place)
            key = as_text(fields[number].id, "the id", row.place).strip()
            file.ids[number] = key or row.key
        except Refusal as problem:
            file.problems[number] = problem
    options = reading.options or reading.otherwise
    options = checked_options(options, f"options={list(options)}") if options else ()
    answer_is = reading.answer_is
    if reading.from_answers and not options and all(row.options is None for row in fields.values()):
        fields, options = with_classes(fields, path.name, answer_is)
        answer_is = "text"
    file = replace(file, answer_is=answer_is, usual=reading.usual_answer_is)
    advice = possible_options(fields.values())
    for number in [number for number in fields if number not in file.problems]:
        try:
            file.drafts[number] = draft_of(given[number], fields[number], options, advice)
        except Refusal as problem:
            file.problems[number] = problem
    return file


def _with_conversation(field: Fields, place: str) -> Fields:
    """The cells of a row with its messages, if it has any, taken apart.

    `messages` then holds the turns before the question, `question` the question, and `answer` that
    of the assistant, if the messages have one.
    """
    if is_missing(field.messages):
        return replace(field, messages=())
    if not is_missing(field.question):
        raise Refusal(
            f"row {place}: got messages and a question, expected one of them; drop the other column"
        )
    turns, question, answer = read_conversation(field.messages, place)
    if answer is not None and not is_missing(field.answer):
        raise Refusal(
            f"row {place}: got an answer beside messages that end with the assistant's, expected "
            "one of them; drop the other"
        )
    answer = field.answer if answer is None else answer
    return replace(field, messages=turns, question=question, answer=answer)


def _answers(
    drafts: Collection[Draft],
    labelled: bool,
    answer_is: AnswerIs | None,
    usual: AnswerIs | None,
) -> list[int | None]:
    """The right option of each row, read by one rule for all of them; None without an answer.

    Args:
        drafts: the rows.
        labelled: whether each must have an answer.
        answer_is: the rule; None to find it.
        usual: the rule that is tried first.
    """
    rows = [draft.answered for draft in drafts]
    with_answers = [row for row in rows if not is_missing(row.answer)]
    if labelled and len(with_answers) < len(rows):
        place = next(row.place for row in rows if is_missing(row.answer))
        raise Refusal(
            f"row {place}: no column 'answer': got an empty one or none, expected one; fill it or "
            "drop the row"
        )
    right = iter(right_options(with_answers, answer_is, usual) if with_answers else ())
    return [None if is_missing(row.answer) else next(right) for row in rows]


def _unique_ids(name: str, ids: Sequence[str]) -> list[str]:
    """The rows' ids, in which a shared one ends in "#2", "#3", … from its second row on."""
    counts = Counter(ids)
    shared = [key for key in ids if counts[key] > 1]
    if not shared:
        return list(ids)
    in_use = set(ids)
    number: Counter[str] = Counter()  # the last one given, by id
    unique = []
    for key in ids:
        number[key] += 1
        unique_key = key
        if number[key] > 1:
            while (unique_key := f"{key}#{number[key]}") in in_use:
                number[key] += 1
        in_use.add(unique_key)
        unique.append(unique_key)
    warning = "%s: %d rows share their ids, such as %r: they are told apart as %r, %r, …"
    logger.warning(warning, name, len(shared), shared[0], shared[0], f"{shared[0]}#2")
    return unique
