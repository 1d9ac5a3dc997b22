"""Records → one HTML page that loads nothing: charts by Vega-Lite, tables, rows."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from bayestune.errors import Refusal
from bayestune.report.claims import Evaluation
from bayestune.report.comparable import names
from bayestune.report.page_data import payload
from bayestune.report.page_json import as_json
from bayestune.report.rows import Record, read_rows, renewed
from bayestune.report.summary import evaluation_tables
from bayestune.report.table import render

MAX_BYTES = 5_000_000
_LIBRARY = ("vega", "vega-lite", "vega-embed")


@dataclass(frozen=True)
class Origin:
    """Which command made a page, and with which code; the page says it."""

    command: str = ""  # the command line
    revision: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


def write_page(
    results: Mapping[Path, Sequence[Record]], to: Path, title: str, origin: Origin | None = None
) -> Path:
    """Writes a page that is complete in itself: figures, charts, rows and where they come from.

    The words say that a method is better or worse only where the paired interval excludes 0 and
    p < 0.05.

    Args:
        results: records by the folder that their rows are in. A record is compared with the first
            one of its task, model and seed.
        to: the file to write.
        title: of the page.
        origin: where the page comes from, if known.

    Returns:
        The file.

    Raises:
        Refusal: if there are no records, or figures alone make the page larger than 5 MB.
    """
    read: list[tuple[Record, list[Any]]] = []
    for folder, records in results.items():
        read += [(record, read_rows(record, folder)) for record in renewed(records, folder)]
    records = [record for record, _ in read]
    if not records:
        raise Refusal("got no records; expected one for each run; run `bayestune compare` first")
    evaluations = []
    for name, (record, rows) in zip(_distinct(names(records)), read, strict=True):
        evaluations.append(Evaluation(name, record, rows))
    head = {"title": title, **asdict(origin or Origin())}
    head["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    text = _page(head | payload(evaluations), render(evaluation_tables(records), "html"))
    size = len(text.encode("utf-8", "backslashreplace"))
    if size > MAX_BYTES:
        got = f"{len(records)} runs, whose figures take {size / 1e6:.1f} MB"
        raise Refusal(f"got {got}; expected a page of at most 5 MB; give fewer results")
    to.parent.mkdir(parents=True, exist_ok=True)
    # a lone surrogate becomes the escape \\udXXX, which JSON reads as the same
    to.write_text(text, encoding="utf-8", errors="backslashreplace")
    return to


def _page(data: Mapping[str, Any], tables: str) -> str:
    """The page: `tables` are for readers without JavaScript."""
    library = [_script(f"vendor/{name}.min.js") for name in _LIBRARY]
    return Template(_text("page.html")).substitute(
        title=escape(data["title"]),
        style=_text("page.css"),
        tables=tables,
        data=as_json(data),
        charts=_json_text(_text("charts.json")),
        library="\n".join(library),
        script=f"<script>\n{_text('page.js')}</script>",
    )


def _text(name: str) -> str:
    return files("bayestune.report").joinpath(name).read_text(encoding="utf-8")


def _script(name: str) -> str:
    """A library as an element; what would end the element early is escaped in its strings."""
    code = re.sub(r"<(/script|!--)", r"<\\\1", _text(name), flags=re.IGNORECASE)
    return f"<script>{code}</script>"


def _json_text(text: str) -> str:
    """A JSON text as it may stand in a script element."""
    return text.replace("<", "\\u003c")


def _distinct(labels: Sequence[str]) -> list[str]:
    """Labels with repeated ones numbered: MLE, MLE (2)."""
    counts: dict[str, int] = {}
    numbered = []
    for label in labels:
        counts[label] = counts.get(label, 0) + 1
        numbered.append(label if counts[label] == 1 else f"{label} ({counts[label]})")
    return numbered
