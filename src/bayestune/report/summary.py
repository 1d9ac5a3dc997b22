"""Records of one task → a table with a line for each method and an interval for each metric."""

from collections.abc import Sequence

from bayestune.report.class_figures import class_tables
from bayestune.report.columns import ACCURACY, AURC, BRIER, CALIBRATED, ECE, NLL
from bayestune.report.comparable import caption, comparable, names
from bayestune.report.gate_figures import gate_tables
from bayestune.report.rows import Record
from bayestune.report.table import Block, Table, marked

_COLUMNS = (ACCURACY, ECE, CALIBRATED, NLL, BRIER, AURC)
_ABOUT_INTERVALS = "In brackets: 95 % intervals over the rows; none where the rows cannot give one."
_ABOUT_ECE = (
    "ECE is above 0 by chance alone. ECE if calibrated: what a perfectly calibrated model "
    "with the same confidences would score on average (5–95 %), and p, its chance to score as much "
    "as was observed."
)


def evaluation_tables(records: Sequence[Record]) -> list[Table]:
    """What an evaluation prints: the metrics, what a gate lets through, and the classes."""
    return [*summary_tables(records), *gate_tables(records), *class_tables(records)]


def summary_tables(records: Sequence[Record]) -> list[Table]:
    """One table for each task, model and number of rows; the best of a column is marked.

    Intervals of ECE from older versions, which do not hold, are left out: see `renewed`.

    Raises:
        Refusal: if there are no records.

    >>> metrics = {"accuracy": {"value": 0.84, "low": 0.80, "high": 0.88}}
    >>> (table,) = summary_tables([{"label": "MLE", "task": "arc_easy", "metrics": metrics}])
    >>> table.blocks[0].lines[0][1][0]
    Cell(number='84.0', behind=('[80.0, 88.0]',), mark='')
    """
    tables = []
    for group in comparable(records):
        columns = [column for column in _COLUMNS if column.sign or any(map(column.of, group))]
        cells = [marked(map(column.with_interval, group), column.sign) for column in columns]
        headings = tuple(column.heading for column in columns)
        notes = [_ABOUT_INTERVALS] + [_ABOUT_ECE] * (CALIBRATED in columns)
        title = caption(group[0], group[0].get("task"), group[0].get("n"))
        tables.append(Table(title, headings, (Block.of("", names(group), cells),), tuple(notes)))
    return tables
