"""Files written whole or not at all, and JSON lines, one object a line."""

import gzip
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bayestune.errors import Refusal

JsonRow = dict[str, Any]


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; the file takes its place once the block has ended well."""
    scratch = path.with_name(f".{path.name}.partial")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text_whole(path: Path, text: str) -> None:
    """Writes UTF-8; a lone surrogate becomes its escape, which JSON reads as the same."""
    with replaced(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json_lines(path: Path, *, missing_ok: bool = False) -> list[JsonRow]:
    """The rows of a whole file, without blank lines; with `missing_ok`, none if there is no file.

    A file whose name ends in `.gz` is gzipped.

    Raises:
        Refusal: if a line is not a JSON object; the error names the file and the line.
        FileNotFoundError: if there is no such file, unless `missing_ok`.
    """
    if missing_ok and not path.is_file():
        return []
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig") as lines:
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    return [json_row(line, f"{path.name}, line {number}") for number, line in numbered]


def json_row(line: str, place: str) -> JsonRow:
    """The JSON object in a line; `place` says where it stands.

    Raises:
        Refusal: if the line is not a JSON object, or a key stands in it twice.
    """
    try:
        row = json_value(line, place)
    except json.JSONDecodeError as error:
        raise Refusal(f"{place}: not a JSON object ({error})") from None
    if not isinstance(row, dict):
        raise Refusal(f"{place}: not a JSON object (got a {type(row).__name__})")
    return row


def json_value(text: str, place: str) -> Any:
    """What a text in JSON holds; `place` says where it stands.

    Raises:
        Refusal: if a key stands twice in one object.
        JSONDecodeError: if it is not JSON.
    """
    return json.loads(text, object_pairs_hook=partial(_once_each, place=place))


def _once_each(pairs: list[tuple[str, Any]], *, place: str) -> JsonRow:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise Refusal(f"{place}: got {twice} more than once, expected each key once; drop one")
    return row


def whole_lines(path: Path) -> list[JsonRow]:
    """The rows of a file that a process was writing to; a last line that was cut is taken off."""
    text = path.read_bytes()
    end = text.rfind(b"\n") + 1
    rows = []
    whole = 0
    for number, line in enumerate(text[:end].splitlines(keepends=True), 1):
        try:
            rows.append(json_row(line.decode("utf-8"), f"{path.name}, line {number}"))
        except ValueError:
            if whole + len(line) < end:  # in the middle: not what a cut leaves
                raise
            break
        whole += len(line)
    if whole < len(text):
        with path.open("r+b") as file:
            file.truncate(whole)
    return rows


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, the whole file or nothing; paths are written as text."""
    write_text_whole(path, "".join(map(json_line, rows)))


def json_line(row: Mapping[str, Any]) -> str:
    """A row as a line; paths are written as text."""
    return json.dumps(row, ensure_ascii=False, default=os.fspath) + "\n"
