"""Records of one task → a table with a line for each method and an interval for each metric."""

from collections.abc import Sequence

from bayestune.report.columns import ACCURACY, AURC, BRIER, ECE, ECE_DEBIASED, NLL
from bayestune.report.comparable import caption, comparable, names
from bayestune.report.rows import Record
from bayestune.report.table import Block, Table, marked

_COLUMNS = (ACCURACY, ECE, ECE_DEBIASED, NLL, BRIER, AURC)
_ABOUT_ECE = (
    "In brackets: bootstrap interval over the rows. Resampling adds noise, which ECE counts as "
    "miscalibration, so the intervals of ECE lie too high and can exclude their estimate."
)


def summary_tables(records: Sequence[Record]) -> list[Table]:
    """One table for each task, model and number of rows; the best of a column is marked.

    Raises:
        Refusal: if there are no records.

    >>> metrics = {"accuracy": {"value": 0.84, "low": 0.80, "high": 0.88}}
    >>> (table,) = summary_tables([{"label": "MLE", "task": "arc_easy", "metrics": metrics}])
    >>> table.blocks[0].lines[0][1][0]
    Cell(number='84.0', behind=('[80.0, 88.0]',), mark='')
    """
    tables = []
    for group in comparable(records):
        cells = [marked(map(column.with_interval, group), column.sign) for column in _COLUMNS]
        headings = tuple(column.heading for column in _COLUMNS)
        notes = (_ABOUT_ECE,) if any(map(ECE.of, group)) else ()
        of = caption(group[0], group[0].get("task"), group[0].get("n"))
        tables.append(Table(of, headings, (Block.of("", names(group), cells),), notes))
    return tables
