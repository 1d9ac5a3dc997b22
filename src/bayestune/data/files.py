"""Reads the user's own rows from JSONL and CSV files."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from bayestune.data.questions import LETTERS, Question
from bayestune.errors import Refusal
from bayestune.jsonl import JsonRow, read_json_lines


def load_rows(
    path: Path, options: Sequence[str] = (), *, labelled: bool = True
) -> tuple[Question, ...]:
    """Reads the user's own questions from a JSONL or CSV file.

    Columns: `question` (or `text`); `options` (or `choices`), a list, in CSV a JSON list or texts
    joined by "|"; `answer`, an index from 0, a letter or an option's text; perhaps `id`, `context`.

    Args:
        path: `.jsonl`, `.json` (one object a line) or `.csv`.
        options: of every row that has none of its own.
        labelled: whether every row must have an answer.

    Raises:
        Refusal: if there are no rows, or one lacks a column or has an answer but no such option.
        FileNotFoundError: if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows: list[JsonRow] = list(csv.DictReader(lines))
    else:
        rows = read_json_lines(path)
    if not rows:
        raise Refusal(f"{path.name} is empty: expected at least one row")
    return tuple(
        _question(row, f"{path.name}:{number}", options, labelled)
        for number, row in enumerate(rows, 1)
    )


def _question(row: JsonRow, key: str, options: Sequence[str], labelled: bool) -> Question:
    given = {name: cell for name, cell in row.items() if cell not in (None, "")}  # CSV has ""
    text = row.get("question") or row.get("text")
    if not text:
        got = sorted(map(str, row))
        raise Refusal(f"row {key}: no column 'question' or 'text'; got the columns {got}")
    own = _options(row.get("options") or row.get("choices") or list(options), key)
    answer = None
    if "answer" in given:
        answer = _answer_index(given["answer"], own, key)
    elif labelled:
        raise Refusal(f"row {key}: no column 'answer'")
    context = str(row.get("context") or "")
    return Question(str(given.get("id", key)), str(text), own, answer, context)


def _options(own: object, key: str) -> tuple[str, ...]:
    if not own:
        raise Refusal(
            f"row {key}: no options; give a column 'options' or the same options for all rows"
        )
    if isinstance(own, str) and own.lstrip().startswith("["):
        try:
            own = json.loads(own)
        except json.JSONDecodeError as error:
            got = f"got options {own!r}, expected a JSON list ({error})"
            raise Refusal(f"row {key}: {got}") from None
    elif isinstance(own, str):
        own = own.split("|")
    if not isinstance(own, list):
        raise Refusal(f"row {key}: got options {own!r}, expected a list of texts")
    return tuple(str(option).strip() for option in own)


def _answer_index(answer: object, options: tuple[str, ...], key: str) -> int:
    text = str(answer).strip()
    if text in options:
        return options.index(text)
    if text.isdecimal() and int(text) < len(options):
        return int(text)
    if text in LETTERS[: len(options)]:
        return LETTERS.index(text)
    raise Refusal(
        f"row {key}: the right answer {answer!r} is not among its options {list(options)}"
    )
