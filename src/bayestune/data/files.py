"""Reads the user's own rows from JSONL and CSV files."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from bayestune.data.questions import LETTERS, Question
from bayestune.jsonl import Record, read_json_lines


def load_rows(
    path: Path, options: Sequence[str] = (), *, labelled: bool = True
) -> tuple[Question, ...]:
    """The user's own questions, from a JSONL or CSV file.

    Columns: `question` (or `text`); `options` or `choices` for the row, a list (in CSV a JSON list or texts joined
    by "|"), unless `options` are given for all rows; `answer`, an index from 0, a letter or an option's text;
    and, if there, `id` and `context`.

    Args:
        path: the file, `.jsonl`, `.json` (one object a line) or `.csv`.
        options: the options of every row that has none of its own.
        labelled: whether every row must have an answer.

    Raises:
        ValueError: if the file is empty, a column is missing, or a row's answer is not among its options.
        FileNotFoundError: if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as lines:
            records: list[Record] = list(csv.DictReader(lines))
    else:
        records = list(read_json_lines(path))
    if not records:
        raise ValueError(f"{path.name} is empty: expected at least one row")
    return tuple(
        own_question(row, f"{path.name}:{i}", options, labelled=labelled)
        for i, row in enumerate(records, 1)
    )


def own_question(
    row: Record, key: str, options: Sequence[str] = (), *, labelled: bool = True
) -> Question:
    """One row of the user's own data, see `load_rows`."""
    text = row.get("question") or row.get("text")
    if not text:
        raise ValueError(
            f"row {key}: no column 'question' or 'text'; got the columns {sorted(map(str, row))}"
        )
    own = _own_options(row.get("options") or row.get("choices") or list(options), key)
    answer = (
        _answer_index(row.get("answer"), own, key)
        if labelled or row.get("answer") not in (None, "")
        else None
    )
    name = key if row.get("id") in (None, "") else str(row["id"])
    return Question(name, str(text), own, answer, str(row.get("context") or ""))


def _own_options(own: object, key: str) -> tuple[str, ...]:
    if not own:
        raise ValueError(
            f"row {key}: no options; give a column 'options' or the same options for all rows"
        )
    if isinstance(own, str):
        try:
            own = json.loads(own) if own.lstrip().startswith("[") else own.split("|")
        except json.JSONDecodeError as error:
            raise ValueError(
                f"row {key}: got options {own!r}, which is no JSON list ({error})"
            ) from None
    if not isinstance(own, list):
        raise ValueError(f"row {key}: got options {own!r}, expected a list of texts")
    return tuple(str(option).strip() for option in own)


def _answer_index(answer: object, options: tuple[str, ...], key: str) -> int:
    if answer is None or answer == "":
        raise ValueError(f"row {key}: no column 'answer'")
    text = str(answer).strip()
    if text in options:
        return options.index(text)
    if text.isdecimal() and int(text) < len(options):
        return int(text)
    if text in LETTERS[: len(options)]:
        return LETTERS.index(text)
    raise ValueError(
        f"row {key}: the right answer {answer!r} is not among its options {list(options)}"
    )
