"""What a gate lets through, as tables: of records, and of a calibration with its promises."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bayestune.report.columns import GATE
from bayestune.report.comparable import caption, comparable, names
from bayestune.report.rows import Record
from bayestune.report.table import DASH, Block, Cell, Table, marked

if TYPE_CHECKING:  # tables are made without the libraries that calibrating takes
    from bayestune.decisions import Calibration


def gate_tables(records: Sequence[Record]) -> list[Table]:
    """One table for each task, model and number of rows: wrong answers that a gate lets through.

    Records of older versions, which have no such figures, are left out.

    >>> gate_tables([{"label": "MLE", "task": "arc_easy", "metrics": {}}])
    []
    """
    tables = []
    with_gate = [record for record in records if "gate" in record]
    for group in comparable(with_gate) if with_gate else ():
        columns = [column for column in GATE if any(map(column.of, group))]
        cells = [marked(map(column.with_interval, group), column.sign) for column in columns]
        title = caption(group[0], group[0].get("task"), group[0].get("n"), "the gate")
        headings = tuple(column.heading for column in columns)
        block = Block.of("", names(group), cells)
        tables.append(Table(title, headings, (block,), (_baselines(group[0]["gate"]),)))
    return tables


def _baselines(figures: Mapping[str, Any]) -> str:
    """What a gate can be compared with at no cost, as a note."""
    return (
        "wrong ≥ 0.9: wrong answers with a confidence of 0.9 or more, a count. Beside it, for "
        f"nothing: a guess is right on {figures['chance']:.1%}, the commonest answer on "
        f"{figures['majority']:.1%}; always asking acts on none."
    )


def variant_table(calibration: "Calibration") -> Table:
    """The ways of predicting that a calibration compared, the kept one marked."""
    lines = []
    for row in calibration.table:
        name = row["variant"] + (" + temperature" if row["temperature"] else "")
        kept = "kept" if row["kept"] else ""
        worse = f"{row['worse_by']:+.3f}"
        behind = (f"± {row['standard_error']:.3f}",)
        cells = [Cell(f"{row['milliseconds']:.1f}"), Cell(f"{100 * row['accuracy']:.1f}")]
        cells += [Cell(f"{row[key]:.3f}") for key in ("nll", "brier", "aurc")]
        lines.append((name, (*cells, Cell(worse, behind), Cell(kept or DASH))))
    heads = ("ms ↓", "ACC % ↑", "NLL ↓", "Brier ↓", "AURC ↓", "NLL above the best", "")
    title = (
        f"ways of predicting · {calibration.num_choosing} held-out rows to choose on, cross-fitted"
    )
    note = "Kept: the cheapest whose NLL is not significantly above the best (one-sided, 5 %)."
    return Table(title, heads, (Block("", tuple(lines)),), (note,), ("Way",))


def promises(calibration: "Calibration") -> str:
    """What a calibration promises, in sentences; the score that decides comes first."""
    kept = f"{calibration.variant}, temperature {calibration.temperature:.3g}"
    lines = [f"Kept: {kept}; decides by {calibration.score}."]
    for name, threshold in calibration.bands.items():
        lines.append(f"  band {name}: {threshold.sentence()}")
    classes = calibration.settings.get("classes")
    for index, threshold in calibration.classes.items():
        name = repr(classes[int(index)]) if classes else index
        lines.append(f"  choice {name}: {threshold.sentence()}")
    deciding = calibration.threshold
    lines.append(f"{calibration.score}: {deciding.sentence()}.")
    if deciding.value is not None:
        lines.append(f"The smallest risk that these rows support is {deciding.supported:.3f}.")
    for score, threshold in calibration.thresholds.items():
        if score != calibration.score:
            lines.append(f"  by {score}: {threshold.sentence()}")
    if baselines := calibration.baselines:
        loss = "mean cost" if calibration.costs else "risk"
        always_act = f"always act, {loss} {baselines['always_act']:.3f}"
        guess = f"a guess, risk {1 - baselines['chance']:.3f}"
        commonest = f"the commonest answer, risk {1 - baselines['majority']:.3f}"
        lines.append(f"For nothing: {always_act}; always ask, acts on none; {guess}; {commonest}.")
    for kind, rule in calibration.sets.items():
        mark = " (in predictions)" if kind == calibration.set_kind else ""
        lines.append(f"Sets {kind}{mark}: the right option is in with {rule.coverage:.0%} or more.")
    return "\n".join(lines)
