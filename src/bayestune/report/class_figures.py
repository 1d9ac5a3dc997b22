"""Rows whose options are classes, as tables: figures of each class, and what is taken for what."""

from collections.abc import Mapping, Sequence
from typing import Any

from bayestune.report.comparable import caption, comparable, names
from bayestune.report.rows import Record
from bayestune.report.table import Block, Cell, Table

_MOST = 12  # classes of a confusion matrix that is printed; records have all
_NOTE = (
    "precision: share of the chosen that are right; recall: share of the class's rows that are "
    "found; F1: 2 hits / (rows + chosen). –: never chosen, or no rows."
)


def class_tables(records: Sequence[Record]) -> list[Table]:
    """For each task and model, the figures of each class and a confusion matrix, by method.

    Records whose rows do not all have the same options have no classes, and are left out.

    >>> class_tables([{"label": "MLE", "task": "arc_easy", "metrics": {}}])
    []
    """
    tables = []
    with_classes = [record for record in records if "by_class" in record]
    for group in comparable(with_classes) if with_classes else ():
        of = (group[0], group[0].get("task"), group[0].get("n"))
        blocks = []
        matrices = []
        for name, record in zip(names(group), group, strict=True):
            by_class = record["by_class"]
            title = f"{name} (macro F1 {by_class['macro_f1']:.3f})"
            blocks.append(Block(title, tuple(map(_figures_line, by_class["classes"]))))
            matrices.append(Block(name, tuple(_confusion_lines(by_class))))
        columns = ("rows", "chosen", "precision %", "recall %", "F1 %", "wrong ≥ 0.9")
        heads = ("Method", "Class")
        tables.append(Table(caption(*of, "classes"), columns, tuple(blocks), (_NOTE,), heads))
        classes = _class_names(group[0])
        if len(classes) <= _MOST and all(_class_names(record) == classes for record in group):
            about = "what was chosen, a column each, for each right answer, a line each"
            heads = ("Method", "Right answer")
            tables.append(Table(caption(*of, about), tuple(classes), tuple(matrices), heads=heads))
    return tables


def _class_names(record: Record) -> list[str]:
    return [figures["name"] for figures in record["by_class"]["classes"]]


def _figures_line(figures: Mapping[str, Any]) -> tuple[str, tuple[Cell, ...]]:
    """A class's line in the table of figures."""
    cells = [Cell(str(figures["rows"])), Cell(str(figures["chosen"]))]
    for key in ("precision", "recall", "f1"):
        share = figures[key]
        cells.append(Cell() if share is None else Cell(f"{100 * share:.1f}"))
    return figures["name"], (*cells, Cell(str(figures["wrong_at_90"])))


def _confusion_lines(by_class: Mapping[str, Any]) -> list[tuple[str, tuple[Cell, ...]]]:
    """A line for each right answer, with how often each class was chosen."""
    lines = []
    for figures, counts in zip(by_class["classes"], by_class["confusion"], strict=True):
        lines.append((figures["name"], tuple(Cell(str(count)) for count in counts)))
    return lines
