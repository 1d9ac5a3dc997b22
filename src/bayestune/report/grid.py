"""Records → the paper's table: methods × tasks in a block for each metric, mean ± standard deviation over seeds."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from bayestune.report.significance import METRICS, by_seed, significance, value_of
from bayestune.report.table import COLUMNS, Column, grouped

Record = Mapping[str, Any]
Style = Literal["text", "markdown", "latex"]
Mark = Literal["", "best", "second"]
DASH = "–"
_SHARED = ("model", "scoring", "bins", "binning", "rows")  # equal within one table
_BLOCKS = ("accuracy", "ece", "nll", "brier", "ece_debiased")
_ABOUT_P = (
    "p: two-sided paired bootstrap over the same questions against {}, losses averaged over the seeds both have, {} "
    "resamples; the seeds are held, and p is not corrected for the number of methods."
)


@dataclass(frozen=True)
class Value:
    """What stands in a cell: a number, ± its standard deviation, how many seeds where others have more, its rank."""

    number: str = DASH
    std: str = ""
    runs: str = ""
    mark: Mark = ""


@dataclass(frozen=True)
class Block:
    """A metric's part of the table: for each method a value for each column."""

    title: str
    rows: tuple[tuple[str, tuple[Value, ...]], ...]


@dataclass(frozen=True)
class GridTable:
    """All that a table says, before it has a style."""

    caption: str
    columns: tuple[str, ...]
    blocks: tuple[Block, ...]
    notes: tuple[str, ...]


def grid_tables(
    records: Sequence[Record],
    folder: str | Path | None = None,
    resamples: int = 1000,
    against: str | None = None,
) -> list[GridTable]:
    """One table for each model and way of scoring.

    Args:
        records: one for each method, task, seed and number of draws; what is missing is a dash.
        folder: where the rows of the records are, for p-values; None for none.
        resamples: of the paired bootstrap; 0 for no p-values.
        against: the method to compare with, whose differences are then shown too; None for that of least mean NLL.

    Raises:
        ValueError: if there are no records, or none of `against`.
    """
    if against is not None and against not in (labels := list(by_seed(records))):
        raise ValueError(
            f"no record of the method to compare with: got {against!r}, expected one of {labels}"
        )
    return [
        _table(group, folder if resamples else None, resamples, against)
        for group in grouped(records, _SHARED)
    ]


def _table(
    records: Sequence[Record], folder: str | Path | None, resamples: int, against: str | None = None
) -> GridTable:
    columns = {
        _column(record): [r for r in records if _column(r) == _column(record)] for record in records
    }
    labels = tuple(by_seed(records))
    runs = {column: by_seed(group) for column, group in columns.items()}
    most = max(len(seeds) for methods in runs.values() for seeds in methods.values())
    shown = [column for key in _BLOCKS for column in COLUMNS if column.key == key]
    blocks = [_block(metric, labels, list(runs.values()), most) for metric in shown]
    notes = [
        f"Best and runner-up of a column are marked; in brackets how many seeds where it is not {most}."
    ]
    if folder is not None:
        blocks += _p_blocks(labels, list(columns.values()), folder, resamples, against)
        notes.append(_ABOUT_P.format(against or "the method of least mean NLL", resamples))
    return GridTable(_caption(records[0], most), tuple(columns), tuple(blocks), tuple(notes))


def _column(record: Record) -> str:
    task, source = str(record.get("task")), record.get("trained_on")
    name = task if source in (None, task) else f"{source} → {task}"
    return f"{name} (n={record.get('n', '?')})"


def _caption(record: Record, seeds: int) -> str:
    parts = [str(record["model"])] if record.get("model") else []
    parts += [f"scored by {record['scoring']}"] if record.get("scoring") else []
    parts.append(
        f"ECE in {record.get('bins', '?')} bins ({record.get('binning', 'binning unknown')})"
    )
    return " · ".join(
        [*parts, f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"]
    )


def _block(
    metric: Column,
    labels: Sequence[str],
    runs: Sequence[Mapping[str, Mapping[Any, Record]]],
    most: int,
) -> Block:
    columns = []
    for methods in runs:
        values = [_value(metric, list(methods.get(label, {}).values()), most) for label in labels]
        columns.append(_marked(values, metric.sign))
    return Block(metric.heading, _transposed(labels, columns))


def _transposed(
    labels: Sequence[str], columns: Sequence[Sequence[Value]]
) -> tuple[tuple[str, tuple[Value, ...]], ...]:
    return tuple((label, tuple(column[i] for column in columns)) for i, label in enumerate(labels))


def _value(metric: Column, records: Sequence[Record], most: int) -> Value:
    numbers = [value for record in records if (value := value_of(record, metric.key)) is not None]
    if not numbers:
        return Value()
    std = metric.number(statistics.stdev(numbers)) if len(numbers) > 1 else ""
    runs = str(len(numbers)) if len(numbers) < most else ""
    return Value(metric.number(statistics.fmean(numbers)), std, runs)


def _marked(values: Sequence[Value], sign: int) -> list[Value]:
    """Marks the best and the second best; what is printed the same is as good."""
    ranked = sorted(
        {float(value.number) for value in values if value.number != DASH}, key=lambda x: -sign * x
    )
    marks: dict[float, Mark] = (
        dict(zip(ranked, ("best", "second"), strict=False)) if len(ranked) > 1 else {}
    )
    return [
        v if v.number == DASH else replace(v, mark=marks.get(float(v.number), "")) for v in values
    ]


def _p_blocks(
    labels: Sequence[str],
    columns: Sequence[Sequence[Record]],
    folder: str | Path,
    resamples: int,
    against: str | None,
) -> list[Block]:
    found = [
        {c["label"]: c for c in significance(group, folder, resamples=resamples, against=against)}
        for group in columns
    ]
    other = [next(iter(column.values()))["against"] if column else None for column in found]
    shown = {column.key: column for column in COLUMNS}

    def value(metric: str, column: int, label: str) -> Value:
        if label == other[column]:
            return Value("–" if against else "best")
        if label not in found[column]:
            return Value()
        difference, p = (found[column][label][metric][key] for key in ("difference", "p_value"))
        sign = "+" if difference > 0 else "−"
        return Value(
            f"{sign}{shown[metric].number(abs(difference))}, p {p:.3f}" if against else f"{p:.3f}"
        )

    blocks = []
    for metric in METRICS:
        title = (
            f"{shown[metric].title} less {against}'s"
            if against
            else f"p ({shown[metric].title.removesuffix(' %')})"
        )
        rows = _transposed(
            labels, [[value(metric, i, label) for label in labels] for i in range(len(columns))]
        )
        blocks.append(Block(title, rows))
    return blocks


# Styles


def _lines(table: GridTable, cell: Callable[[Value], str]) -> list[list[list[str]]]:
    """The blocks' lines: metric (on a block's first line), method, cells."""
    return [
        [
            [block.title if i == 0 else "", label, *map(cell, values)]
            for i, (label, values) in enumerate(block.rows)
        ]
        for block in table.blocks
    ]


def _plain(value: Value) -> str:
    std, runs = f" ± {value.std}" if value.std else "", f" ({value.runs})" if value.runs else ""
    return f"{value.number}{std}{runs}"


def _text(table: GridTable) -> str:
    marks = {"": "", "best": "*", "second": "+"}
    blocks = _lines(table, lambda value: _plain(value) + marks[value.mark])
    head = ["Metric", "Method", *table.columns]
    widths = [max(len(line[i]) for line in [head, *chain(*blocks)]) for i in range(len(head))]
    rule = "  ".join("-" * width for width in widths)
    parts = [
        "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in block
        )
        for block in [[head], *blocks]
    ]
    return "\n".join(
        [table.caption, "", f"\n{rule}\n".join(parts), rule, *table.notes, "* best, + runner-up"]
    )


def _markdown(table: GridTable) -> str:
    def cell(value: Value) -> str:
        form = {"": "{}", "best": "**{}**", "second": "<u>{}</u>"}[value.mark]
        return form.format(value.number) + _plain(value).removeprefix(value.number)

    lines = [["Metric", "Method", *table.columns], ["---", "---", *("---:" for _ in table.columns)]]
    lines += chain(*_lines(table, cell))
    body = [
        f"| {' | '.join(' '.join(c.replace('|', chr(92) + '|').split()) for c in line)} |"
        for line in lines
    ]
    return "\n".join([table.caption, "", *body, "", *table.notes])


_ESCAPES = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "→": r"$\to$",
    "±": r"$\pm$",
    "·": r"$\cdot$",
    "–": "--",
}


def escaped(text: str) -> str:
    r"""Text as LaTeX.

    >>> escaped("arc_easy, 100 % ↑")
    'arc\\_easy, 100 \\% $\\uparrow$'
    """
    return "".join(_ESCAPES.get(character, character) for character in text)


def _latex(table: GridTable) -> str:
    def cell(value: Value) -> str:
        form = {"": "{}", "best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"}[value.mark]
        std = rf"$_{{\pm{value.std}}}$" if value.std else ""
        return form.format(escaped(value.number)) + std + (f" ({value.runs})" if value.runs else "")

    def row(cells: Sequence[str]) -> str:
        return f"{' & '.join(cells)} \\\\"

    head = row([r"Metric", "Method", *map(escaped, table.columns)])
    blocks = [
        "\n".join(row([escaped(title), escaped(label), *cells]) for title, label, *cells in block)
        for block in _lines(table, cell)
    ]
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escaped(' '.join([table.caption + '.', *table.notes]))}}}",
            rf"\begin{{tabular}}{{ll{'r' * len(table.columns)}}}",
            r"\toprule",
            "\n\\midrule\n".join([head, *blocks]),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def render_grid(tables: Sequence[GridTable], style: Style = "text") -> str:
    """The tables in a style: "text" marks the best * and the runner-up +, the others in bold and underlined.

    Raises:
        ValueError: if the style is unknown.
    """
    styles: dict[str, Callable[[GridTable], str]] = {
        "text": _text,
        "markdown": _markdown,
        "latex": _latex,
    }
    if style not in styles:
        raise ValueError(
            f"got the style {style!r}; expected one of {sorted(styles)}; choose one of them"
        )
    return "\n\n".join(styles[style](table) for table in tables)
