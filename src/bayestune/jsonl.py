"""JSON lines: one object a line, read and written here and nowhere else."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_json_lines(path: Path) -> Iterator[Record]:
    """The objects of a file with one JSON object a line; a line that is none is named."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path.name}, line {number}: not a JSON object ({error})"
                    ) from None
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{path.name}, line {number}: not a JSON object (got a {type(row).__name__})"
                    )
                yield row


def write_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, as a whole or not at all."""
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    scratch.replace(path)
