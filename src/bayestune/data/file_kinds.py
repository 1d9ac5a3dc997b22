"""Reads a file of rows as it stands: JSON lines, a JSON array, CSV of any separator, parquet."""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from bayestune.data.column_roles import known_names, plain_name
from bayestune.errors import Refusal
from bayestune.whole_files import JsonRow, json_row, json_value

SEPARATORS = (",", ";", "\t", "|")
_JSON = (".jsonl", ".ndjson", ".json")
_DELIMITED = (".csv", ".tsv", ".tab", ".txt", "")
_PARQUET = (".parquet", ".pq")
# the longer marks first, because UTF-32's begins with UTF-16's
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LONGEST_CELL = 2**31 - 1


@dataclass(frozen=True)
class GivenRow:
    """One row as its file gives it."""

    key: str  # file:number, the id of a row without one
    place: str  # where it stands, for messages
    cells: JsonRow
    problem: Refusal | None = None  # why it cannot be read, where others can


def given_rows(path: Path) -> list[GivenRow]:
    """The rows of a file, whichever of the known kinds it is; gzipped ones too.

    Raises:
        Refusal: if the file is of another kind, or is not text in UTF-8 or UTF-16; what is wrong
            with single rows stands in these.
        FileNotFoundError: if there is no such file.
    """
    if path.is_dir():
        raise Refusal(f"{path} is a folder: got no file, expected one of {_kinds()}; name the file")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    data = path.read_bytes()
    name = PurePath(path.name)
    if data.startswith(b"\x1f\x8b"):
        data = _unzipped(data, path.name)
        name = name.with_suffix("") if name.suffix.lower() == ".gz" else name
    kind = name.suffix.lower()
    if kind in _PARQUET or data.startswith(b"PAR1"):
        return _parquet(path)
    if kind not in (*_JSON, *_DELIMITED) or data.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise Refusal(
            f"{path.name} is of a kind that is not read: got {kind or 'an archive'}, expected one "
            f"of {_kinds()}; save a spreadsheet as CSV (UTF-8)"
        )
    text = _decoded(data, path.name)
    if text.lstrip().startswith("["):
        return _array(text, path.name)
    if kind in _JSON or text.lstrip().startswith("{"):
        return _lines(text, path.name)
    return _delimited(text, path.name)


def _kinds() -> str:
    return ", ".join((*_JSON, ".csv", ".tsv", ".parquet"))


def _unzipped(data: bytes, name: str) -> bytes:
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise Refusal(f"{name} is damaged or cut off ({error}); fetch or pack it again") from None


def _decoded(data: bytes, name: str) -> str:
    """A file's bytes as text, by its byte order mark, else as UTF-8."""
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        got = f"byte 0x{data[error.start]:02x}"
        raise Refusal(
            f"{name}, line {line}: not {encoding} text: got {got}, expected UTF-8 or UTF-16; save "
            "it as UTF-8 (Excel: CSV UTF-8)"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise Refusal(
            f"{name}, line {line}: got a zero byte, expected text; save it as UTF-8 (UTF-16 needs "
            "its byte order mark)"
        )
    return text


def _array(text: str, name: str) -> list[GivenRow]:
    """The rows of a JSON array."""
    try:
        listed = json_value(text, name)
    except json.JSONDecodeError as error:
        raise Refusal(f"{name}, line {error.lineno}: not a JSON array ({error})") from None
    rows = []
    for number, row in enumerate(listed, 1):
        key = f"{name}:{number}"
        problem = None
        if not isinstance(row, dict):
            got = f"row {key}: got a {type(row).__name__}"
            problem = Refusal(f"{got}, expected an object with a question; mend or drop it")
        rows.append(GivenRow(key, key, {} if problem else row, problem))
    return rows


def _lines(text: str, name: str) -> list[GivenRow]:
    """The rows of JSON lines, empty ones left out."""
    rows = []
    # at "\n" alone, because a text may hold any of Unicode's other line ends
    for line, written in enumerate(text.split("\n"), 1):
        if written.strip():
            number = len(rows) + 1
            key = f"{name}:{number}"
            place = key if line == number else f"{key} (line {line})"
            try:
                rows.append(GivenRow(key, place, json_row(written, f"{name}, line {line}")))
            except Refusal as problem:
                rows.append(GivenRow(key, place, {}, problem))
    return rows


def _delimited(text: str, name: str) -> list[GivenRow]:
    """The rows of a CSV file; Python's limit on the length of a cell is lifted meanwhile."""
    if text[:4].lower() == "sep=":  # Excel's own first line
        text = text.partition("\n")[2]
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        return _records(text, name)
    except csv.Error as error:
        advice = 'close every quote and write a quote within one as ""'
        raise Refusal(f"{name}: not a table of cells ({error}); {advice}") from None
    finally:
        csv.field_size_limit(limit)


def _records(text: str, name: str) -> list[GivenRow]:
    """The rows of a CSV file whose first line that is not empty is its header."""
    reader = _cells(text, _separator(text))
    _, header = next(reader, (0, []))
    while header and not header[-1].strip():  # a spreadsheet's empty columns
        header.pop()
    names = [cell.strip() for cell in header]
    if twice := sorted({cell for cell in names if cell and names.count(cell) > 1}):
        raise Refusal(f"{name}: got the columns {twice} more than once; rename or drop one of each")
    rows = []
    for line, cells in reader:
        key = f"{name}:{len(rows) + 1}"
        place = f"{key} (line {line})"
        surplus = [cell for cell in cells[len(names) :] if cell.strip()]
        problem = None
        if surplus or len(cells) < len(names):
            problem = Refusal(
                f"row {place}: got {len(cells)} cells, expected {len(names)} as in the header; put "
                "a cell that holds the separator into quotes"
            )
        rows.append(GivenRow(key, place, dict(zip(names, cells, strict=False)), problem))
    return rows


def _cells(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The records that are not empty, each with the number of its first line."""
    records = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    lines_before = 0
    for cells in records:
        if any(cell.strip() for cell in cells):
            yield lines_before + 1, cells
        lines_before = records.line_num


def _separator(text: str) -> str:
    """The separator under which the header has most known names; of several, most columns."""

    def columns_under(separator: str) -> tuple[int, int]:
        try:
            _, header = next(_cells(text, separator), (0, []))
        except csv.Error:
            return (0, 0)
        return (sum(plain_name(cell) in known_names() for cell in header), len(header))

    return max(SEPARATORS, key=columns_under)


def _parquet(path: Path) -> list[GivenRow]:
    """The rows of a parquet file, `ClassLabel` numbers as their names, −1 as missing."""
    from datasets import ClassLabel, Dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        rows = Dataset.from_parquet(str(path), keep_in_memory=True)
    except (ValueError, OSError, DatasetGenerationError) as error:
        reason = " ".join(str(error).split())
        raise Refusal(f"{path.name} is no whole parquet file ({reason}); save it again") from None
    classes: dict[str, list[str]] = {}  # by column
    for column, kind in rows.features.items():
        if isinstance(kind, ClassLabel):
            classes[column] = kind.names
    given = []
    for number, row in enumerate(rows, 1):
        cells = dict(row)
        for column, names in classes.items():
            value = cells[column]
            cells[column] = names[value] if value is not None and value >= 0 else None
        key = f"{path.name}:{number}"
        given.append(GivenRow(key, key, cells))
    return given
