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

    Records of rows whose options are not classes have none.

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
            found = record["by_class"]
            title = f"{name} (macro F1 {found['macro_f1']:.3f})"
            blocks.append(Block(title, tuple(map(_line, found["classes"]))))
            matrices.append(Block(name, tuple(_counts(found))))
        heads = ("rows", "chosen", "precision %", "recall %", "F1 %", "wrong ≥ 0.9")
        labels = ("Method", "Class")
        tables.append(Table(caption(*of, "classes"), heads, tuple(blocks), (_NOTE,), labels))
        classes = _classes(group[0])
        if len(classes) <= _MOST and all(_classes(record) == classes for record in group):
            about = "what was chosen, a column each, for each right answer, a line each"
            labels = ("Method", "Right answer")
            tables.append(Table(caption(*of, about), tuple(classes), tuple(matrices), heads=labels))
    return tables


def _classes(record: Record) -> list[str]:
    return [one["name"] for one in record["by_class"]["classes"]]


def _line(one: Mapping[str, Any]) -> tuple[str, tuple[Cell, ...]]:
    cells = [Cell(str(one["rows"])), Cell(str(one["chosen"]))]
    for key in ("precision", "recall", "f1"):
        cells.append(Cell() if one[key] is None else Cell(f"{100 * one[key]:.1f}"))
    return one["name"], (*cells, Cell(str(one["wrong_at_90"])))


def _counts(found: Mapping[str, Any]) -> list[tuple[str, tuple[Cell, ...]]]:
    lines = []
    for one, counts in zip(found["classes"], found["confusion"], strict=True):
        lines.append((one["name"], tuple(Cell(str(count)) for count in counts)))
    return lines
