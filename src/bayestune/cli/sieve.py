"""Rows of a file that can be read, where others cannot: what is bad is told row by row."""

import csv
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bayestune.data import AnswerIs, Question, load_rows
from bayestune.errors import Refusal
from bayestune.evaluation import unread_row
from bayestune.jsonl import JsonRow, write_json_lines


@dataclass(frozen=True)
class Sieved:
    """A file whose rows can all be read, and the lines of those of the given file that cannot."""

    file: Path
    unread: dict[int, dict[str, Any]] = field(default_factory=dict)  # by the row's number, from 0

    def num_unread(self, before: int) -> int:
        """How many of the first so many rows could not be read."""
        return sum(number < before for number in self.unread)

    def told(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """What the answer of each row of the given file repeats of it."""
        asked = (
            {"id": q.id, "question": q.question, "options": list(q.options)} for q in questions
        )
        return list(self.in_order(asked, 0))

    def in_order(self, lines: Iterator[dict[str, Any]], start: int) -> Iterator[dict[str, Any]]:
        """The lines of rows that were read, and between them those of rows that were not.

        Args:
            lines: of rows that were read, without those that stand before `start`.
            start: how many rows of the given file are answered already.
        """
        number = start
        for line in lines:
            while number in self.unread:
                yield self.unread[number]
                number += 1
            yield line
            number += 1
        while number in self.unread:
            yield self.unread[number]
            number += 1


@contextmanager
def sieved(
    path: Path, options: Sequence[str], answer_is: AnswerIs | None = None
) -> Iterator[Sieved]:
    """The file itself if all rows can be read, else a copy without those that cannot.

    Raises:
        Refusal: if no row can be read.
    """
    try:
        load_rows(path, options, labelled=False, answer_is=answer_is)
        yield Sieved(path)
        return
    except Refusal as problem:
        rows = _raw_rows(path)
        if not rows:
            raise
        first = problem
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, f"{path.stem}.jsonl")
        unread = {}
        good = []
        for number, (line, row) in enumerate(rows):
            key = f"{path.name}:{line}"
            found = _read_alone(row, key, options, copy)
            if isinstance(found, str):
                unread[number] = unread_row(key, row, found)
            else:
                good.append(found)
        if not good:
            raise first
        write_json_lines(copy, good)
        yield Sieved(copy, unread)


def _read_alone(row: Any, key: str, options: Sequence[str], scratch: Path) -> JsonRow | str:
    """The row with an id, or why it cannot be read."""
    if not isinstance(row, dict):
        return f"row {key}: not a JSON object: {str(row).strip()[:80]!r}"
    named = {**row, "id": row.get("id") or key}
    try:
        write_json_lines(scratch, [named])
        load_rows(scratch, options, labelled=False)
    except Refusal as problem:
        return str(problem).replace(f"{scratch.name}:1", key)
    return named


def _raw_rows(path: Path) -> list[tuple[int, Any]]:
    """The rows of JSON lines or CSV with their numbers in ids; text where a line is no JSON."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except ValueError:
        return []
    if path.suffix.lower() == ".csv":
        return list(enumerate(csv.DictReader(text.splitlines(keepends=True)), 1))
    rows = []
    for line in text.split("\n"):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError:
                rows.append(line)
    return list(enumerate(rows, 1))
