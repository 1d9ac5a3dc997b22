"""Records → a table, as plain text, markdown or HTML."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Record = Mapping[str, Any]
STYLES = ("text", "markdown", "html")
_SHARED = (
    "task",
    "model",
    "scoring",
    "n",
    "bins",
    "binning",
)  # equal within one table: only then can values compare


@dataclass(frozen=True)
class Column:
    """How a metric is shown: value × `scale`, with `digits` decimals; `sign` is 1 if higher is better, else −1."""

    key: str
    title: str
    scale: float
    digits: int
    sign: int

    @property
    def heading(self) -> str:
        """The title, and an arrow to the better side."""
        return f"{self.title} {'↑' if self.sign > 0 else '↓'}"

    def number(self, value: float | None) -> str:
        """The value in the column's unit and digits; a dash if there is none."""
        if value is None or not math.isfinite(value):
            return "–"
        return f"{value * self.scale:.{self.digits}f}"


COLUMNS = (
    Column("accuracy", "ACC %", 100, 1, 1),
    Column("ece", "ECE %", 100, 1, -1),
    Column("ece_debiased", "ECE debiased %", 100, 1, -1),
    Column("nll", "NLL", 1, 3, -1),
    Column("brier", "Brier", 1, 3, -1),
    Column("aurc", "AURC", 1, 3, -1),
)


@dataclass(frozen=True)
class _Cell:
    value: str
    interval: str
    best: bool


def names(records: Sequence[Record]) -> list[str]:
    """A name for each record: its label, and of task, model, scoring and seed what tells the records apart.

    Args:
        records: one per evaluated method.

    Returns:
        As many names, distinct unless the records agree in all of these.

    >>> names([{"label": "MLE", "seed": 1}, {"label": "MLE", "seed": 2}])
    ['MLE, seed 1', 'MLE, seed 2']
    """
    differing = [
        key
        for key in ("task", "model", "scoring", "seed")
        if len({str(r.get(key)) for r in records}) > 1
    ]
    parts = {"seed": "seed {}", "scoring": "by {}"}
    return [
        ", ".join(
            [
                str(r.get("label", r.get("method"))),
                *(parts.get(k, "{}").format(r.get(k)) for k in differing),
            ]
        )
        for r in records
    ]


def grouped(records: Sequence[Record], keys: Sequence[str] = _SHARED) -> list[list[Record]]:
    """Records of the same task, model, scoring, rows and binning, in order of appearance.

    Args:
        records: one per evaluated method.
        keys: what must be the same within a group.

    Returns:
        Groups within which values compare.

    Raises:
        ValueError: if there are no records.

    >>> [len(group) for group in grouped([{"task": "a"}, {"task": "b"}, {"task": "a"}])]
    [2, 1]
    """
    if not records:
        raise ValueError(
            "got no records; expected one per evaluated method; run `bayestune bench` first"
        )
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(str(record.get(key)) for key in keys), []).append(record)
    return list(groups.values())


def heading(record: Record) -> str:
    """What a table is of: task, model, scoring, rows, bins.

    >>> heading({"task": "arc_easy", "n": 300, "bins": 15, "binning": "textbook"})
    'arc_easy · 300 rows · ECE in 15 bins (textbook)'
    """
    parts = [str(record[key]) for key in ("task", "model") if record.get(key)]
    parts += [f"scored by {record['scoring']}"] if record.get("scoring") else []
    parts += [f"{record['n']} rows"] if "n" in record else []
    return " · ".join(
        [
            *parts,
            f"ECE in {record.get('bins', '?')} bins ({record.get('binning', 'binning unknown')})",
        ]
    )


def _cells(column: Column, group: Sequence[Record]) -> list[_Cell]:
    metrics = [record.get("metrics", {}).get(column.key) or {} for record in group]
    shown = [column.number(metric.get("value")) for metric in metrics]
    # What is printed the same is as good as the best.
    finite = [column.sign * float(text) for text in shown if text != "–"]
    cells = []
    for metric, text in zip(metrics, shown, strict=True):
        interval = (
            f"[{column.number(metric.get('low'))}, {column.number(metric.get('high'))}]"
            if metric
            else ""
        )
        best = len(group) > 1 and text != "–" and column.sign * float(text) == max(finite)
        cells.append(_Cell(text, interval, best))
    return cells


def _lines(group: Sequence[Record]) -> list[tuple[str, list[_Cell]]]:
    columns = [_cells(column, group) for column in COLUMNS]
    return [(name, [cells[i] for cells in columns]) for i, name in enumerate(names(group))]


def _text(group: Sequence[Record]) -> str:
    rows = [["Method", *(column.heading for column in COLUMNS)]]
    for name, cells in _lines(group):
        rows.append(
            [name, *(f"{c.value}{'*' if c.best else ''} {c.interval}".strip() for c in cells)]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(
        [heading(group[0]), "", lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
    )


def _markdown(group: Sequence[Record]) -> str:
    rows = [
        ["Method", *(column.heading for column in COLUMNS)],
        ["---", *("---:" for _ in COLUMNS)],
    ]
    for name, cells in _lines(group):
        rows.append(
            [
                " ".join(name.replace("|", r"\|").split()),
                *(f"{_bold(c)} {c.interval}".strip() for c in cells),
            ]
        )
    return "\n".join([heading(group[0]), "", *(f"| {' | '.join(row)} |" for row in rows)])


def _bold(cell: _Cell) -> str:
    return f"**{cell.value}**" if cell.best else cell.value


def _html(group: Sequence[Record]) -> str:
    head = "".join(f'<th scope="col">{column.heading}</th>' for column in COLUMNS)
    body = ""
    for name, cells in _lines(group):
        data = "".join(
            f"<td{' class=best' if c.best else ''}><b>{c.value}</b> <span>{c.interval}</span></td>"
            for c in cells
        )
        body += f'<tr><th scope="row">{escape(name)}</th>{data}</tr>\n'
    head = f'<thead><tr><th scope="col">Method</th>{head}</tr></thead>'
    caption = f"<caption>{escape(heading(group[0]))}</caption>"
    return f'<div class="scroll"><table>{caption}{head}\n<tbody>{body}</tbody></table></div>'


def render_table(records: Sequence[Record], style: str = "text") -> str:
    """One line per record, every metric with its interval; one table for each task, model and number of rows.

    Args:
        records: one per evaluated method, as read from JSON lines.
        style: "text", "markdown" or "html".

    Returns:
        The table below a line that says what it is of. The best value of a column is marked if there are several:
        with `*` in text, bold in markdown.

    Raises:
        ValueError: if there are no records, or the style is unknown.

    >>> metrics = {"accuracy": {"value": 0.84, "low": 0.80, "high": 0.88, "n": 300}}
    >>> print(render_table([{"label": "MLE", "task": "arc_easy", "n": 300, "bins": 15, "metrics": metrics}])[:32])
    arc_easy · 300 rows · ECE in 15
    """
    render = {"text": _text, "markdown": _markdown, "html": _html}.get(style)
    if render is None:
        raise ValueError(f"got style {style!r}; expected one of {STYLES}; 'text' is for terminals")
    return "\n\n".join(render(group) for group in grouped(records))
