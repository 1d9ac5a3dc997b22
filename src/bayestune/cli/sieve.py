"""What the answer of each row of a file repeats of it, whether it can be read or not."""

from collections.abc import Iterator
from typing import Any

from bayestune.data import SortedRows
from bayestune.session import in_order

Line = dict[str, Any]


def told(rows: SortedRows) -> list[Line]:
    """What the answer of each row of a file repeats of it, and a hash of all that it is about."""
    asked: Iterator[Line] = (
        {
            "id": row.id,
            "question": row.question,
            "options": list(row.options),
            "fingerprint": row.fingerprint,
        }
        for row in rows.questions
    )
    return list(in_order(rows, asked))
