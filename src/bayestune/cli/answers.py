"""The lines of `predict`: written as they come, to standard output or to a file gone on with."""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from jsonargparse import Namespace

from bayestune.cli.output_folder import check_writable, inputs_of, refuse_both
from bayestune.cli.run_settings import (
    check_same,
    read_settings,
    settings_file,
    write_settings,
)
from bayestune.data import SortedRows, digest
from bayestune.errors import Refusal
from bayestune.runtime import in_first_process, is_first_process, of_first_process
from bayestune.session import in_order
from bayestune.whole_files import JsonRow, json_line, whole_lines

STANDARD_INPUT = Path("-")
_COUNT = "how many rows"


@dataclass(frozen=True)
class Answers:
    """A file of one line a row, or standard output.

    A new run beside a finished file writes to a hidden file, which takes the old one's place at the
    end. A run that is resumed goes on after the last whole line; a line that was cut is mended.
    """

    path: Path | None
    resume: bool = False

    @classmethod
    def of(cls, options: Namespace) -> Self:
        """The output of a command; refused before any work if it may not or cannot be written."""
        path = options.output
        refuse_both(options.resume, options.overwrite)
        in_first_process(partial(_check, path, options))  # which looks before it writes
        return cls(path, options.resume)

    @property
    def replaces(self) -> Path | None:
        """The hidden file that takes the place of a finished one at the end."""
        return self.path.with_name(f".{self.path.name}.unfinished") if self.path else None

    def begin(self, rows: Sequence[JsonRow], settings: dict[str, Any]) -> tuple[Path | None, int]:
        """The file to write to, None for standard output, and how many rows it has already.

        Called by all processes, of which the first one writes.

        Raises:
            Refusal: with `--resume`, if the lines there are of other rows or settings.
        """
        return in_first_process(partial(self._begun, rows, settings))

    def _begun(self, rows: Sequence[JsonRow], settings: dict[str, Any]) -> tuple[Path | None, int]:
        path = self.path
        if path is None or (path.exists() and not path.is_file()):  # a device or a pipe
            return path, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = self.replaces
        assert hidden is not None
        if not self.resume:
            place = hidden if path.exists() else path
            place.write_text("")
            write_settings(place, settings | _texts(rows, len(rows)))
            return place, 0
        place = hidden if hidden.exists() else path
        if not place.exists():
            place.write_text("")
        done = _whole_rows(place, rows)
        if done and not settings_file(place).is_file():
            raise Refusal(
                f"--resume: got {place} without {settings_file(place).name}, which says how its "
                "lines were made, expected both; give --overwrite to begin anew"
            )
        # a file that rows were added to goes on, with those that it had
        count = (read_settings(place) or {}).get(_COUNT, len(rows))
        check_same(place, settings | _texts(rows, count))
        write_settings(place, settings | _texts(rows, len(rows)))
        return place, done

    def finish(self, place: Path | None) -> None:
        """Puts a new file in the place of the old one."""
        if not is_first_process():
            return
        if place is not None and self.path is not None and place == self.replaces:
            settings_file(place).replace(settings_file(self.path))
            place.replace(self.path)


def _check(path: Path | None, options: Namespace) -> None:
    if path is None:
        if options.resume:
            raise Refusal("--resume goes on with a file: got none, expected --output")
        return
    refuse_input(path, options)
    if path.is_file() and not (options.overwrite or options.resume):
        raise FileExistsError(
            f"{path} is there already: choose another --output, or give --overwrite, or "
            "--resume to go on after its last line"
        )
    check_writable(path.absolute().parent)


def _texts(rows: Sequence[JsonRow], count: int) -> dict[str, Any]:
    """What the first rows of a file are about, of which an answer repeats a part."""
    found = [row.get("fingerprint") for row in rows[:count]]
    return {_COUNT: count, "the texts of the rows, contexts among them": digest(found)[:10]}


def _whole_rows(path: Path, rows: Sequence[JsonRow]) -> int:
    """How many lines of a file answer the first rows; a last line that was cut is taken off."""
    lines = whole_lines(path)
    if len(lines) > len(rows):
        raise Refusal(f"--resume: {path} has {len(lines)} lines, but the input {len(rows)} rows")
    for number, (line, row) in enumerate(zip(lines, rows, strict=False), 1):
        if any(line.get(name) != row.get(name) for name in ("id", "question", "options")):
            raise Refusal(
                f"--resume: line {number} of {path} answers row {line.get('id')!r}, but the input "
                f"has {row['id']!r} there, or asks it otherwise; give the input it was begun with"
            )
    return len(lines)


def refuse_input(path: Path, options: Namespace) -> None:
    """Refuses an output that is a folder, or a file that the command reads."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: expected a file for --output")
    for name, given in inputs_of(options):
        inside = given.is_dir() and path.resolve().is_relative_to(given)
        if path.resolve() == given or (inside and path.exists()):
            raise Refusal(f"--output {path} is an input, --{name} {given}; choose another")


class LineWriter:
    """Writes rows as JSON lines, each flushed at once; in the first process alone."""

    def __init__(self, place: Path | None) -> None:
        self._writes = is_first_process()
        here = place if self._writes else None
        self._file = sys.stdout if here is None else here.open("ab")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not sys.stdout:
            self._file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes a row; what is written is whole lines, whatever ends the process afterwards."""
        if not self._writes:
            return
        line = json_line(row)
        if self._file is sys.stdout:
            sys.stdout.write(line)
        else:
            self._file.write(line.encode("utf-8", "backslashreplace"))  # type: ignore[arg-type]
        self._file.flush()


def _read_once(path: Path) -> bytes:
    if path != STANDARD_INPUT:
        with path.open("rb") as pipe:
            return pipe.read()
    text = getattr(sys.stdin, "buffer", sys.stdin).read()
    return text.encode() if isinstance(text, str) else text


@contextmanager
def readable(path: Path) -> Iterator[Path]:
    """A file for rows that come through standard input (`-`) or a pipe; others as they are."""
    if path != STANDARD_INPUT and (path.is_file() or not path.exists() or path.is_dir()):
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        text = of_first_process(_read_once(path) if is_first_process() else b"")
        is_json = text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"["))
        copy = Path(scratch, "input.jsonl" if is_json else "input.csv")
        copy.write_bytes(text)
        yield copy


def repeated(rows: SortedRows) -> list[JsonRow]:
    """What each row's line repeats of the row, and a hash of all its texts; or its `error`."""
    asked: Iterator[JsonRow] = (
        {
            "id": row.id,
            "question": row.question,
            "options": list(row.options),
            "fingerprint": row.fingerprint,
        }
        for row in rows.questions
    )
    return list(in_order(rows, asked))
