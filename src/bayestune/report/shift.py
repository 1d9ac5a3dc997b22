"""Records of one training set evaluated on others → how far accuracy, calibration and uncertainty hold under shift."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bayestune.evaluation import read_records
from bayestune.report.rows import read_rows
from bayestune.report.table import COLUMNS, Column, Record
from bayestune.selective import Row, error_auroc, is_right, shift_auroc, uncertainty

SOURCE = "openbookqa"
# How a task is headed, and how far it is from the questions of SOURCE; in the order of the columns.
TASKS = {
    "openbookqa": ("OBQA", "no"),
    "arc_challenge": ("ARC-C", "small"),
    "arc_easy": ("ARC-E", "small"),
    "mmlu_chemistry": ("Chem", "large"),
    "mmlu_physics": ("Phy", "large"),
}
STYLES = ("text", "markdown")
_METRICS = ("accuracy", "ece", "nll")
_SHARED = ("model", "scoring", "bins", "binning")  # equal within one table
_WORDS = {
    "one_minus_confidence": "1 − confidence",
    "total_entropy": "total entropy",
    "expected_entropy": "expected entropy",
    "mutual_information": "mutual information",
}
_AUROC = Column("auroc", "AUROC %", 100, 1, 1)
_NOTE = "{seeds}. –: no rows, all right or all wrong, or a score "
_NOTE += "that is the same for every row, as the mutual information of a single draw."
_RIGHT = "Right or wrong: AUROC % ↑ of each score for errors, 50 is a coin flip"
_DOMAIN = "In-domain or not: AUROC % ↑ of each score (as a share of its most for the row's options) for the task's "
_DOMAIN += "rows against those of {source}, 50 is a coin flip"


@dataclass(frozen=True)
class _Run:
    """A record and its rows."""

    record: Record
    rows: Sequence[Row]


@dataclass(frozen=True)
class _Grid:
    """All runs of one table: method → (task, seed) → run."""

    source: str
    tasks: Sequence[str]
    seeds: Sequence[str]
    runs: Mapping[str, Mapping[tuple[str, str], _Run]]

    def values(self, measure: "_Measure", method: str, task: str) -> list[float]:
        """The measure for each seed that has it."""
        runs = self.runs[method]
        pairs = [(runs.get((task, seed)), runs.get((self.source, seed))) for seed in self.seeds]
        found = [measure(run, familiar) for run, familiar in pairs if run]
        return [value for value in found if value is not None and math.isfinite(value)]


_Measure = Callable[
    [_Run, _Run | None], float | None
]  # of a run and, if there is one, its in-domain run


def _origin(record: Record) -> str:
    return str(record.get("trained_on") or record.get("task"))


def has_shift(records: Sequence[Record], source: str = SOURCE) -> bool:
    """Whether a method trained on the source is evaluated on another task.

    >>> has_shift([{"task": "arc_easy", "trained_on": "openbookqa"}]), has_shift([{"task": "openbookqa"}])
    (True, False)
    """
    return any(_origin(record) == source and record.get("task") != source for record in records)


def _selected(records: Sequence[Record], source: str) -> list[list[Record]]:
    """The records of the source's posteriors, apart by what makes figures incomparable."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        if _origin(record) == source:
            groups.setdefault(tuple(str(record.get(key)) for key in _SHARED), []).append(record)
    if not groups:
        got = f"no records of methods trained on {source!r} among {len(records)}"
        raise ValueError(
            f"got {got}; expected some with trained_on={source!r}; run the benchmark on it first"
        )
    return list(groups.values())


def _grid(group: Sequence[Record], folder: Path, source: str) -> _Grid:
    """Later records of the same method, task and seed take the place of earlier ones."""
    keys = [
        (str(r.get("label", r.get("method"))), str(r.get("method")), str(r.get("draws")))
        for r in group
    ]
    same = {label: len({key for key in keys if key[0] == label}) > 1 for label, _, _ in keys}
    found: dict[str, dict[tuple[str, str], Record]] = {}
    for (label, method, draws), record in zip(keys, group, strict=True):
        name = f"{label} ({method}, {draws} draws)" if same[label] else label
        found.setdefault(name, {})[str(record.get("task")), str(record.get("seed"))] = record
    present = dict.fromkeys(str(record.get("task")) for record in group)
    tasks = [
        source,
        *(t for t in TASKS if t in present and t != source),
        *(t for t in present if t not in TASKS),
    ]
    runs = {
        name: {k: _Run(r, read_rows(r, folder)) for k, r in some.items()}
        for name, some in found.items()
    }
    return _Grid(
        source,
        list(dict.fromkeys(tasks)),
        list(dict.fromkeys(str(r.get("seed")) for r in group)),
        runs,
    )


def _metric(key: str) -> _Measure:
    return lambda run, _: (run.record.get("metrics", {}).get(key) or {}).get("value")


def _varies(rows: Sequence[Row], score: str) -> bool:
    return len(rows) > 0 and len(uncertainty(rows, score).unique()) > 1


def _error(score: str) -> _Measure:
    def measure(run: _Run, _: _Run | None) -> float | None:
        ranked = _varies(run.rows, score) and len(is_right(run.rows).unique()) > 1
        return error_auroc(run.rows, score) if ranked else None

    return measure


def _shift(score: str) -> _Measure:
    def measure(run: _Run, familiar: _Run | None) -> float | None:
        if (
            familiar is None
            or not run.rows
            or not familiar.rows
            or not _varies([*run.rows, *familiar.rows], score)
        ):
            return None
        return shift_auroc(run.rows, familiar.rows, score)

    return measure


def _cell(column: Column, values: Sequence[float], seeds: int) -> str:
    if not values:
        return column.number(None)
    spread = f" ± {column.number(statistics.stdev(values))}" if len(values) > 1 else ""
    return f"{column.number(statistics.mean(values))}{spread}{f' ({len(values)})' if len(values) < seeds else ''}"


def _best(column: Column, cells: Sequence[str]) -> list[bool]:
    """Which cells have the best mean as printed, if there are several."""
    means = [
        column.sign * float(cell.split(" ")[0]) if cell != column.number(None) else -math.inf
        for cell in cells
    ]
    return [len(cells) > 1 and math.isfinite(mean) and mean == max(means) for mean in means]


def _block(
    grid: _Grid, heading: str, column: Column, measure: _Measure, tasks: Sequence[str], style: str
) -> list[list[str]]:
    """A line per method: heading, method, and a cell per task."""
    columns = []
    for task in tasks:
        cells = [
            _cell(column, grid.values(measure, method, task), len(grid.seeds))
            for method in grid.runs
        ]
        marks = _best(column, cells)
        columns.append(
            [_mark(cell, style) if best else cell for cell, best in zip(cells, marks, strict=True)]
        )
    return [
        [heading, method, *(cells[i] for cells in columns)] for i, method in enumerate(grid.runs)
    ]


def _mark(cell: str, style: str) -> str:
    mean, *rest = cell.split(" ")
    return " ".join([f"**{mean}**" if style == "markdown" else f"{mean}*", *rest])


def _short(task: str) -> str:
    return TASKS[task][0] if task in TASKS else task


def _task_heading(task: str, source: str) -> str:
    """The task and its shift, which is known from SOURCE only."""
    known = source == SOURCE and task in TASKS
    shift = "in domain" if task == source else f"{TASKS[task][1]} shift" if known else "shifted"
    return f"{_short(task)} ({shift})"


def _layout(head: Sequence[str], lines: Sequence[Sequence[str]], style: str) -> str:
    if style == "markdown":
        rows = [
            [" ".join(cell.replace("|", r"\|").split()) for cell in row] for row in (head, *lines)
        ]
        rows.insert(1, ["---", "---", *("---:" for _ in head[2:])])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(len(row[i]) for row in (head, *lines)) for i in range(len(head))]
    rows = [head, ["-" * width for width in widths], *lines]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _counts(grid: _Grid) -> str:
    """How many rows each task has, with all numbers where they differ."""
    parts = []
    for task in grid.tasks:
        records = [
            run.record
            for runs in grid.runs.values()
            for (name, _), run in runs.items()
            if name == task
        ]
        numbers = dict.fromkeys(str(record.get("n", "?")) for record in records)
        parts += [f"{_short(task)} {' or '.join(numbers)}"] if numbers else []
    return ", ".join(parts)


def _first(grid: _Grid) -> Record:
    return next(run.record for runs in grid.runs.values() for run in runs.values())


def _title(grid: _Grid) -> str:
    first = _first(grid)
    parts = [f"trained on {_short(grid.source)}", *([str(first["model"])] * ("model" in first))]
    parts += [f"scored by {first['scoring']}"] if first.get("scoring") else []
    parts += [f"{_counts(grid)} rows"]
    return " · ".join(
        [
            *parts,
            f"ECE in {first.get('bins', '?')} bins ({first.get('binning', 'binning unknown')})",
        ]
    )


def _render(grid: _Grid, style: str) -> str:
    shown = [
        (column.heading, column, _metric(column.key))
        for column in COLUMNS
        if column.key in _METRICS
    ]
    others = [task for task in grid.tasks if task != grid.source]
    parts = {
        _NOTE.format(seeds=_seeds(len(grid.seeds))): ("Metric", grid.tasks, shown),
        _RIGHT: (
            "Score",
            grid.tasks,
            [(word, _AUROC, _error(score)) for score, word in _WORDS.items()],
        ),
        _DOMAIN.format(source=_short(grid.source)): (
            "Score",
            others,
            [(w, _AUROC, _shift(score)) for score, w in _WORDS.items()],
        ),
    }
    text = [_title(grid)]
    for note, (first, tasks, blocks) in parts.items():
        if tasks:
            lines = [
                line
                for name, c, measure in blocks
                for line in _block(grid, name, c, measure, tasks, style)
            ]
            text += [
                note,
                _layout(
                    [first, "Method", *(_task_heading(t, grid.source) for t in tasks)], lines, style
                ),
            ]
    return "\n\n".join(text)


def _seeds(number: int) -> str:
    return (
        f"Mean ± standard deviation over {number} seeds; (k): of k seeds only"
        if number > 1
        else "One seed"
    )


def shift_table(
    records: Sequence[Record], folder: str | Path, style: str = "text", source: str = SOURCE
) -> str:
    """Methods trained on one task and evaluated on others: accuracy, ECE and NLL, and what their uncertainty tells.

    Three tables of a line per method and a column per task: the metrics; AUROC of each uncertainty score for errors;
    AUROC of each score for the task's rows against in-domain rows of the same method and seed. Cells are means over
    seeds ± their standard deviation (of seeds − 1); the best mean is marked, whether or not the difference is more
    than noise.

    Args:
        records: with the fields task, trained_on (the task itself if missing), method, label, draws, seed, metrics,
            predictions; those trained on something else are left out, and a later record of the same method, task
            and seed takes the place of an earlier one.
        folder: where the records' predictions are.
        style: "text" or "markdown".
        source: the task trained on.

    Returns:
        The tables below a line that says what they are of; such a part for each model and scoring.

    Raises:
        ValueError: if the style is unknown or there are no records of the source.
    """
    if style not in STYLES:
        raise ValueError(f"got style {style!r}; expected one of {STYLES}; 'text' is for terminals")
    groups = _selected(records, source)
    return "\n\n".join(_render(_grid(group, Path(folder), source), style) for group in groups)


def _panels(grid: _Grid, prefix: str) -> dict[str, dict[str, list[Sequence[Row]]]]:
    """Title of a task → method → its rows of each seed, without what is missing."""
    panels: dict[str, dict[str, list[Sequence[Row]]]] = {}
    for task in grid.tasks:
        for method, runs in grid.runs.items():
            rows = [run.rows for (name, _), run in runs.items() if name == task and run.rows]
            if rows:
                panels.setdefault(f"{prefix}{_task_heading(task, grid.source)}", {})[method] = rows
    return panels


def write_shift(folder: str | Path, source: str = SOURCE) -> list[Path]:
    """Writes `shift.md`, and `risk_coverage.png` if any rows are there, from the records of a results folder.

    Args:
        folder: holds `records.jsonl` and the predictions; both files go there.
        source: the task trained on.

    Returns:
        The paths written.

    Raises:
        ValueError: if there are no records of the source.
    """
    folder = Path(folder)
    grids = [_grid(group, folder, source) for group in _selected(read_records(folder), source)]
    path, panels = folder / "shift.md", {}
    path.write_text(
        "\n\n".join(_render(grid, "markdown") for grid in grids) + "\n", encoding="utf-8"
    )
    for grid in grids:
        told = [str(_first(grid)[key]) for key in _SHARED if len(grids) > 1 and key in _first(grid)]
        panels |= _panels(grid, " · ".join([*told, ""]))
    if not panels:
        return [path]
    from bayestune.report import curves, plots

    return [path, plots.save(curves.risk_coverage_panels(panels), folder / "risk_coverage.png")]
