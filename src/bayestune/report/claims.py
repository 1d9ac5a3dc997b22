"""What may be said of two methods: only what the paired interval and p < 0.05 support."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bayestune.metrics import LEVEL, PairedDifference, Row, accuracy, paired_bootstrap
from bayestune.report.columns import ACCURACY, BRIER, CALIBRATED, ECE, NLL, Column
from bayestune.report.rows import Record, paired_tensors, tensors
from bayestune.report.table import Block, Cell, Table

RESAMPLES = 1000
COMPARED = (ACCURACY, NLL, BRIER)  # no interval of a difference of ECEs covers
Compared = Mapping[Column, PairedDifference] | str  # or why they cannot be compared
_WORDS = {ACCURACY: "accuracy", NLL: "NLL", BRIER: "Brier score"}


@dataclass(frozen=True)
class Evaluation:
    """A record, the name it goes by, and its rows; none if their file is missing."""

    name: str
    record: Record
    rows: Sequence[Row]

    def with_interval(self, column: Column) -> str:
        """A metric's value and interval, with its unit."""
        cell = column.with_interval(self.record)
        unit = "\N{NO-BREAK SPACE}%" if column.scale == 100 else ""
        return " ".join([cell.number + unit, *cell.behind])

    def opening(self) -> str:
        """Its own numbers, and how far its confidence is from its accuracy."""
        text = (
            f"On {self.record.get('n', '?')} questions of {self.record.get('task', '?')}, "
            f"{self.name} has {self.with_interval(ACCURACY)} right, with an NLL of "
            f"{self.with_interval(NLL)} and a calibration error (ECE) of {self.with_interval(ECE)}"
        )
        if CALIBRATED.of(self.record):
            score = self.with_interval(CALIBRATED)
            text += f", where a perfectly calibrated model would score {score}"
        text += "."
        if not self.rows:
            return text
        p, labels = tensors(self.rows)
        gap = 100 * (p.max(1).values.mean().item() - accuracy(p, labels))
        size = f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'}"
        if float(f"{gap:.1f}") == 0:
            size = "less than 0.1 points from"
        return f"{text} Its confidence is on average {size} its accuracy on these questions."


def compare(first: Evaluation, other: Evaluation) -> Compared:
    """Other minus first on the rows that both have, or why they cannot be compared."""
    for one in (first, other):
        if not one.rows:
            return f"the predictions of {one.name} are missing"
    if first.record.get("task") != other.record.get("task"):
        return "they are of different tasks"
    paired = paired_tensors([(other.rows, first.rows)])
    if paired is None:
        return "they have no row in common"
    return {column: paired_bootstrap(*paired, column.key, RESAMPLES) for column in COMPARED}


def verdict(column: Column, paired: PairedDifference) -> int:
    """1 if better, −1 if worse, 0 unless the interval excludes 0 and p is below 1 − LEVEL."""
    settled = (paired.low > 0 or paired.high < 0) and paired.p_value < 1 - LEVEL
    if not settled:
        return 0
    return column.sign * (1 if paired.difference > 0 else -1)


def sentence(first: Evaluation, other: Evaluation, compared: Compared) -> str:
    """What the paired intervals support about other against first."""
    if isinstance(compared, str):
        return f"{other.name} cannot be compared with {first.name} here: {compared}."
    metrics: dict[int, list[str]] = {1: [], -1: [], 0: []}  # by verdict
    for column, paired in compared.items():
        side = verdict(column, paired)
        size = f" (by {_size(column, abs(paired.difference))})" if side else ""
        metrics[side].append(_WORDS[column] + size)
    heads = {1: "better in ", -1: "worse in ", 0: "not settled by these rows: "}
    parts = [heads[side] + listing(words) for side, words in metrics.items() if words]
    on = f"on the same {compared[NLL].n} questions"
    return f"{other.name} against {first.name} {on}: {'; '.join(parts)}."


def _size(column: Column, difference: float) -> str:
    """A difference with its unit; one that is printed as 0 is less than the last digit."""
    unit = " points" if column.scale == 100 else ""
    if column.is_zero(difference):
        return f"less than {10**-column.digits:.{column.digits}f}{unit}"
    return f"{column.number(difference)}{unit}"


def paired_table(compared: Sequence[tuple[Evaluation, Compared]]) -> Table:
    """A line for each comparison: the number of shared rows, and each metric's difference."""
    lines = []
    for other, differences in compared:
        cells = [Cell()] * (1 + len(COMPARED))
        if not isinstance(differences, str):
            cells = [Cell(str(differences[NLL].n))]
            for column, paired in differences.items():
                value, low, high = map(column.signed, (paired.difference, paired.low, paired.high))
                behind = (f"[{low}, {high}]", f"p = {paired.p_value:.3f}")
                better = verdict(column, paired) > 0 and not column.is_zero(paired.difference)
                cells.append(Cell(value, behind, "better" if better else ""))
        lines.append((other.name, tuple(cells)))
    headings = ("Rows", *(column.heading for column in COMPARED))
    return Table("", headings, (Block("", tuple(lines)),))


def listing(words: Sequence[str]) -> str:
    """Words as in a sentence: one, two and three."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
