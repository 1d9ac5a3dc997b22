"""Reads the user's own rows from files of the usual kinds."""

import ast
import json
import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from bayestune.data.answer_readings import Answered, AnswerIs, right_options
from bayestune.data.column_roles import Columns, Fields, as_option, as_text, is_missing
from bayestune.data.file_kinds import GivenRow, given_rows
from bayestune.data.questions import Question
from bayestune.errors import Refusal

logger = logging.getLogger(__name__)


def load_rows(
    path: str | PathLike[str],
    options: Sequence[str] = (),
    *,
    labelled: bool = True,
    answer_is: AnswerIs | None = None,
) -> tuple[Question, ...]:
    """Reads the user's own questions from a file.

    Columns: `question` (or `text`, which beside `question` is its context); `options` (or
    `choices`), a list, in CSV a JSON list or texts joined by "|", or columns such as `option_a`,
    `option_b`; `answer` (or `label`); perhaps `id` and `context` (or `passage`). Others are named
    in a warning. An empty cell, null and NaN are the same: nothing.

    Args:
        path: `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet`, in UTF-8 or UTF-16, perhaps gzipped.
        options: of every row that has none of its own.
        labelled: whether every row must have an answer.
        answer_is: "index" (from 0), "letter" or "text"; None to find what all rows agree with.

    Returns:
        The questions. Ids that several rows share are told apart by numbers, with a warning.

    Raises:
        Refusal: if the file cannot be read, has no rows, a row lacks a column or has none of its
            options as its answer, or answers can be read in two ways; file and line are named.
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    options = checked_options(options, f"options={list(options)}") if options else ()
    given = given_rows(path)
    if not given:
        raise Refusal(f"{path.name} is empty: expected at least one row; check the file")
    columns = Columns(path.name, [row.cells for row in given])
    fields = [columns.fields(row.cells, row.place) for row in given]
    own_options = [field.options is not None for field in fields]
    if not options:
        _refuse_without_options(given, fields)
    elif all(own_options):
        logger.warning("%s: `options` are not used: every row has its own", path.name)
    drafts = [_draft(row, field, options) for row, field in zip(given, fields, strict=True)]
    answers = _answers(drafts, labelled, answer_is)
    ids = _unique_ids(path.name, [draft.id for draft in drafts])
    columns.say()
    questions = []
    for key, draft, answer in zip(ids, drafts, answers, strict=True):
        question = Question(key, draft.question, draft.answered.options, answer, draft.context)
        questions.append(question)
    return tuple(questions)


@dataclass(frozen=True)
class _Draft:
    """A row whose right option is not known yet."""

    id: str
    question: str
    context: str
    answered: Answered


def _draft(row: GivenRow, field: Fields, options: Sequence[str]) -> _Draft:
    """A row's texts, and its answer with its options, its own before those of all rows."""
    labels: tuple[str, ...] = ()
    own = tuple(options)
    if field.options is not None:
        texts, labels = _options(field.options, row.place)
        own = checked_options(texts, f"row {row.place}")
    answered = Answered(row.place, field.answer, own, labels, field.counted)
    context = as_text(field.context, "the context", row.place)
    key = as_text(field.id, "the id", row.place).strip() or row.key
    return _Draft(key, _text(row, field), context, answered)


def _text(row: GivenRow, field: Fields) -> str:
    text = as_text(field.question, "the question", row.place)
    if not text and is_missing(field.question):
        got = sorted(map(str, row.cells))
        raise Refusal(
            f"row {row.place}: no column 'question' or 'text'; got the columns {got}, expected a "
            "text in one of these; name and fill it"
        )
    if not text:
        raise Refusal(
            f"row {row.place}: got the question {field.question!r}, which is how a missing value "
            "is written, expected a text; fill it or drop the row"
        )
    return text


def _answers(
    drafts: Sequence[_Draft], labelled: bool, answer_is: AnswerIs | None
) -> list[int | None]:
    """The right option of each row; None where there is no answer and none is needed."""
    rows = [draft.answered for draft in drafts]
    known = [row for row in rows if not is_missing(row.answer)]
    if labelled and len(known) < len(rows):
        place = next(row.place for row in rows if is_missing(row.answer))
        raise Refusal(f"row {place}: no column 'answer': got an empty one or none, expected one")
    right = iter(right_options(known, answer_is) if known else ())
    return [None if is_missing(row.answer) else next(right) for row in rows]


def _refuse_without_options(given: Sequence[GivenRow], fields: Sequence[Fields]) -> None:
    """Refuses rows without options; the message offers the answers that the file has."""
    lacking = [row.place for row, field in zip(given, fields, strict=True) if field.options is None]
    if not lacking:
        return
    for row, field in zip(given, fields, strict=True):
        _text(row, field)  # a row without a question lacks more
    words = sorted({str(f.answer).strip() for f in fields if isinstance(f.answer, str)})
    advice = f", such as {json.dumps(words, ensure_ascii=False)}" if 1 < len(words) <= 26 else ""
    raise Refusal(
        f"row {lacking[0]}: no options; give a column 'options' or the same options for all "
        f"rows{advice}"
    )


def _options(own: Any, place: str) -> tuple[list[Any], tuple[str, ...]]:
    """A row's options, and their own labels if the cell names some."""
    if isinstance(own, str):
        own = _parsed_cell(own, place)
    labels: list[Any] = []
    if isinstance(own, dict) and isinstance(own.get("text"), list):
        labels = own.get("label") or []
        own = own["text"]
    elif isinstance(own, dict):
        labels = list(own)
        own = list(own.values())
    elif isinstance(own, list) and own and all(isinstance(each, dict) for each in own):
        labels = [each["label"] for each in own if "label" in each]
        own = [each.get("text") for each in own]
    if not isinstance(own, list):
        raise Refusal(f"row {place}: got options {own!r}, expected a list of texts")
    if labels and len(labels) != len(own):
        raise Refusal(
            f"row {place}: got {len(labels)} labels of {len(own)} options, expected one for each"
        )
    return own, tuple(str(label).strip() for label in labels)


def _parsed_cell(text: str, place: str) -> Any:
    """A cell of text as a list: in JSON, as Python prints it, or joined by bars."""
    if text.lstrip()[:1] not in ("[", "{"):
        return text.split("|")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            got = f"got options {text!r}, expected a JSON list ({error})"
            raise Refusal(f"row {place}: {got}") from None


def checked_options(options: Collection[Any], place: str) -> tuple[str, ...]:
    """Options as texts.

    Raises:
        Refusal: if there are fewer than two, one is empty or no text, or two are the same.
    """
    if isinstance(options, str):
        raise Refusal(f"{place}: got options {options!r}, expected a list of texts")
    texts = []
    for option in options:
        texts.append(as_option(option, place))
    if len(texts) < 2:
        raise Refusal(
            f"{place}: got {len(texts)} options, expected at least two; in one cell join them "
            'by "|"'
        )
    if twice := [text for text, count in Counter(texts).items() if count > 1]:
        raise Refusal(
            f"{place}: got the options {twice} more than once in {texts}, expected each once; "
            "drop or reword one"
        )
    return tuple(texts)


def _unique_ids(name: str, ids: Sequence[str]) -> list[str]:
    """The rows' ids; those of an id's later rows end in a number of their own."""
    counts = Counter(ids)
    shared = [key for key in ids if counts[key] > 1]
    if not shared:
        return list(ids)
    taken = set(ids)
    seen: Counter[str] = Counter()
    unique = []
    for key in ids:
        seen[key] += 1
        own = key
        if seen[key] > 1:
            while (own := f"{key}#{seen[key]}") in taken:
                seen[key] += 1
        taken.add(own)
        unique.append(own)
    said = "%s: %d rows share their ids, such as %r: they are told apart as %r, %r, …"
    logger.warning(said, name, len(shared), shared[0], shared[0], f"{shared[0]}#2")
    return unique
