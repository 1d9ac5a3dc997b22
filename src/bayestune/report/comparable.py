"""Which records can stand in one table, what it calls them, and its caption."""

from collections.abc import Iterable, Sequence
from typing import Any

from bayestune.errors import Refusal
from bayestune.report.rows import Record

Seeds = dict[Any, Record]  # a method's records, by seed
SETTING = ("model", "scoring", "bins", "binning", "rows")


def comparable(records: Sequence[Record], *, same_task: bool = True) -> list[list[Record]]:
    """Groups of records whose metrics compare: those of one `SETTING`, and of one task and size.

    Args:
        records: one for each evaluated method.
        same_task: false if a group may hold several tasks and sizes.

    Raises:
        Refusal: if there are no records.
    """
    if not records:
        expected = "one for each evaluated method"
        raise Refusal(f"got no records; expected {expected}; run `bayestune bench` first")
    keys = (*SETTING, "task", "n") if same_task else SETTING
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        filled = {"rows": "evaluation", **record}  # older versions did not write `rows`
        groups.setdefault(tuple(str(filled.get(key)) for key in keys), []).append(record)
    return list(groups.values())


def differing(records: Sequence[Record], keys: Iterable[str] = SETTING) -> list[str]:
    """The keys in which records differ."""
    differ = []
    for key in keys:
        if len({str(record.get(key)) for record in records}) > 1:
            differ.append(key)
    return differ


def label_of(record: Record) -> str:
    """What the record's method is called."""
    return str(record.get("label", record.get("method")))


def names(records: Sequence[Record]) -> list[str]:
    """A name for each record, such as "MLE, seed 1".

    It is the label, followed by those of task, model, scoring and seed that differ among them.
    """
    keys = differing(records, ("task", "model", "scoring", "seed"))
    forms = {"seed": "seed {}", "scoring": "by {}"}
    full_names = []
    for record in records:
        parts = [forms.get(key, "{}").format(record.get(key)) for key in keys]
        full_names.append(", ".join([label_of(record), *parts]))
    return full_names


def by_seed(records: Iterable[Record]) -> dict[str, Seeds]:
    """The records of each method by seed; the later one where two have the same seed."""
    runs: dict[str, Seeds] = {}
    for record in records:
        runs.setdefault(label_of(record), {})[record.get("seed")] = record
    return runs


def caption(record: Record, first: object = None, rows: object = None, last: str = "") -> str:
    """The caption of a table, such as: arc_easy · m · 300 rows · ECE in 15 bins (textbook).

    Args:
        record: one of its records, for what all of them have in common.
        first: begins the caption.
        rows: how many.
        last: ends it.
    """
    scoring = record.get("scoring")
    scored = f"scored by {scoring}" if scoring else ""
    size = f"{rows} rows" if rows is not None else ""
    bins = f"{record.get('bins', '?')} bins ({record.get('binning', 'binning unknown')})"
    parts = [first, record.get("model"), scored, size, f"ECE in {bins}", last]
    return " · ".join(str(part) for part in parts if part)
