"""Answers of rows that can be read, and between them those of rows that cannot."""

from collections.abc import Iterator
from typing import Any

from bayestune.data import SortedRows

Line = dict[str, Any]


def in_order(rows: SortedRows, lines: Iterator[Line], start: int = 0) -> Iterator[Line]:
    """The lines of all rows of a file in their order; of one that cannot be read, its `error`.

    Args:
        rows: of the file.
        lines: of rows that can be read, without those that stand before `start`.
        start: how many rows of the file are answered already.
    """
    count = len(rows.questions) + len(rows.problems)
    for number in range(start, count):
        if number in rows.problems:
            key, problem = rows.problems[number]
            yield {"id": key, "error": str(problem)}
        else:
            yield next(lines)


def told(rows: SortedRows) -> list[Line]:
    """What the answer of each row of a file repeats of it."""
    asked: Iterator[Line] = (
        {"id": row.id, "question": row.question, "options": list(row.options)}
        for row in rows.questions
    )
    return list(in_order(rows, asked))
