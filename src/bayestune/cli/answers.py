"""Rows in, lines out: files and pipes of rows, and the JSON lines that a command makes of them.

Lines go to standard output or to a file, with which a later `predict --resume` goes on.
"""

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
    Settings,
    check_same,
    read_settings,
    settings_file,
    write_settings,
)
from bayestune.data import SortedRows, digest
from bayestune.errors import Refusal
from bayestune.runtime import in_first_process, is_first_process, of_first_process
from bayestune.session import lines_of_all_rows
from bayestune.whole_files import JsonRow, json_line, whole_lines

STANDARD_INPUT = Path("-")
_NUM_ROWS = "how many rows"  # the name of this setting


@dataclass(frozen=True)
class Answers:
    """A file of one line a row, or standard output.

    A new run beside a finished file writes to a hidden file, which takes the old one's place at the
    end. A run that is resumed goes on after the last whole line; a line that was cut is taken off.

    Args:
        path: the file; None for standard output.
        resume: whether to go on with the lines that are there.
    """

    path: Path | None
    resume: bool = False

    @classmethod
    def of(cls, args: Namespace) -> Self:
        """The output of a command, by `--output`, `--resume` and `--overwrite`.

        Raises:
            OSError: if there is a file and neither flag is given, or it cannot be written.
            Refusal: if both flags are given, or the file is one that the command reads.
        """
        refuse_both(args.resume, args.overwrite)
        in_first_process(partial(_check, args.output, args))  # which looks before it writes
        return cls(args.output, args.resume)

    def begin(self, rows: Sequence[JsonRow], settings: Settings) -> tuple[Path | None, int]:
        """Makes the file ready to be written to.

        Called by all processes, of which the first one writes.

        Args:
            rows: what each line repeats of its row.
            settings: how the lines are made.

        Returns:
            The file to write to, None for standard output; and how many rows it has already.

        Raises:
            Refusal: with `--resume`, if the lines there are of other rows or settings.
        """
        return in_first_process(partial(self._begin_here, rows, settings))

    def _begin_here(self, rows: Sequence[JsonRow], settings: Settings) -> tuple[Path | None, int]:
        """What `begin` does, in the first process."""
        path = self.path
        if path is None or (path.exists() and not path.is_file()):  # a device or a pipe
            return path, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = unfinished_file(path)
        if not self.resume:
            file = hidden if path.exists() else path
            file.write_text("")
            write_settings(file, settings | _settings_of_rows(rows, len(rows)))
            return file, 0
        file = hidden if hidden.exists() else path
        if not file.exists():
            file.write_text("")
        num_done = _count_answered(file, rows)
        if num_done and not settings_file(file).is_file():
            raise Refusal(
                f"--resume: got {file} without {settings_file(file).name}, which says how its "
                "lines were made, expected both; give --overwrite to begin anew"
            )
        # rows may have been added to the input since: those that it had then must be the same
        num_before = (read_settings(file) or {}).get(_NUM_ROWS, len(rows))
        check_same(file, settings | _settings_of_rows(rows, num_before))
        write_settings(file, settings | _settings_of_rows(rows, len(rows)))
        return file, num_done

    def finish(self, file: Path | None) -> None:
        """Puts a hidden file in the place of the old one, once all lines are written.

        Args:
            file: what `begin` returned.
        """
        if file is None or self.path is None or not is_first_process():
            return
        if file == unfinished_file(self.path):
            settings_file(file).replace(settings_file(self.path))
            file.replace(self.path)


def unfinished_file(path: Path) -> Path:
    """The hidden file beside `path` that is written first and then takes its place."""
    return path.with_name(f".{path.name}.unfinished")


def _check(path: Path | None, args: Namespace) -> None:
    """Refuses an output that may not or cannot be written, before any work."""
    if path is None:
        if args.resume:
            raise Refusal("--resume goes on with a file: got none, expected --output")
        return
    refuse_input(path, args)
    if path.is_file() and not (args.overwrite or args.resume):
        raise FileExistsError(
            f"{path} is there already: choose another --output, or give --overwrite, or "
            "--resume to go on after its last line"
        )
    check_writable(path.absolute().parent)


def _settings_of_rows(rows: Sequence[JsonRow], count: int) -> Settings:
    """`count`, and a digest of all texts of a file's first rows; lines repeat only some of them."""
    fingerprints = [row.get("fingerprint") for row in rows[:count]]
    return {
        _NUM_ROWS: count,
        "the texts of the rows, contexts among them": digest(fingerprints)[:10],
    }


def _count_answered(path: Path, rows: Sequence[JsonRow]) -> int:
    """How many rows the lines of a file answer; a last line that was cut is taken off.

    Raises:
        Refusal: if a line is of another row than the one in its place.
    """
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


def refuse_input(path: Path, args: Namespace) -> None:
    """Refuses an output that is a folder, or a file that the command reads.

    Args:
        path: of the output.
        args: the command's options, which name what it reads.

    Raises:
        IsADirectoryError: if it is a folder.
        Refusal: if it is one of the inputs, or a file in one of them.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: expected a file for --output")
    for name, read in inputs_of(args):
        is_inside = read.is_dir() and path.resolve().is_relative_to(read)
        if path.resolve() == read or (is_inside and path.exists()):
            raise Refusal(f"--output {path} is an input, --{name} {read}; choose another")


def new_output_file(args: Namespace) -> Path | None:
    """The file of `--output`, in a folder that is there; None for standard output.

    Raises:
        OSError: if it is there without `--overwrite`, or cannot be written.
        Refusal: if it is a file that the command reads.
    """
    path: Path | None = args.output
    if path is None or not is_first_process():
        return path
    refuse_input(path, args)
    if path.exists() and not args.overwrite:
        advice = "choose another --output, or give --overwrite"
        raise FileExistsError(f"{path} is there already: {advice}")
    check_writable(path.absolute().parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class LineWriter:
    """Writes rows as JSON lines, each flushed at once; in the first process alone.

    Args:
        file: to append to; None for standard output.
    """

    def __init__(self, file: Path | None) -> None:
        self._writes = is_first_process()
        if self._writes and file is not None:
            self._file = file.open("ab")
        else:
            self._file = sys.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not sys.stdout:
            self._file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes a row as a line, and flushes it: a process that ends then leaves whole lines."""
        if not self._writes:
            return
        line = json_line(row)
        if self._file is sys.stdout:
            sys.stdout.write(line)
        else:
            self._file.write(line.encode("utf-8", "backslashreplace"))  # type: ignore[arg-type]
        self._file.flush()


@contextmanager
def readable_file(path: Path) -> Iterator[Path]:
    """A file of the rows that come through standard input or a pipe, for the time of the context.

    Args:
        path: `-` for standard input, a pipe, or a file, which is left as it is.
    """
    if path != STANDARD_INPUT and (path.is_file() or not path.exists() or path.is_dir()):
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        text = of_first_process(_read_stream(path) if is_first_process() else b"")
        is_json = text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"["))
        copy = Path(scratch, "input.jsonl" if is_json else "input.csv")
        copy.write_bytes(text)
        yield copy


def _read_stream(path: Path) -> bytes:
    if path != STANDARD_INPUT:
        with path.open("rb") as pipe:
            return pipe.read()
    text = getattr(sys.stdin, "buffer", sys.stdin).read()
    return text.encode() if isinstance(text, str) else text


def repeated_fields(rows: SortedRows) -> list[JsonRow]:
    """What each row's line repeats of the row, and a fingerprint of all its texts.

    Args:
        rows: of a file.

    Returns:
        One a row, in the order of the file; of a row that cannot be read, its `error`.
    """
    fields: list[JsonRow] = []
    for row in rows.questions:
        fields.append(
            {
                "id": row.id,
                "question": row.question,
                "options": list(row.options),
                "fingerprint": row.fingerprint,
            }
        )
    return list(lines_of_all_rows(rows, iter(fields)))
