"""How the metrics of records are shown: title, unit, digits, and which side is better."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bayestune.report.comparable import Seeds
from bayestune.report.rows import Record
from bayestune.report.table import DASH, Block, Cell, Mark, marked


@dataclass(frozen=True)
class Column:
    """A metric: value × `scale`, with `digits` decimals.

    The `sign` is 1 if higher is better, −1 if lower is, and 0 if neither.
    """

    key: str
    title: str
    scale: float
    digits: int
    sign: int

    @property
    def heading(self) -> str:
        """The title and an arrow to the better side."""
        return f"{self.title} {' ↑↓'[self.sign]}".rstrip()

    def of(self, record: Record) -> Mapping[str, Any]:
        """The value and interval in a record; empty if it has none."""
        return record.get("metrics", {}).get(self.key) or {}

    def values(self, methods: Mapping[str, Seeds]) -> dict[str, list[float]]:
        """The values of each method, one for each seed that has a finite one."""
        values_of = {}
        for method, seeds in methods.items():
            values = [self.of(record).get("value", math.nan) for record in seeds.values()]
            values_of[method] = list(filter(math.isfinite, values))
        return values_of

    def number(self, value: float | None) -> str:
        """A value in the column's unit and digits; a dash if there is none."""
        if value is None or not math.isfinite(value):
            return DASH
        return f"{value * self.scale:.{self.digits}f}"

    def is_zero(self, value: float) -> bool:
        """Whether a value is printed as 0."""
        return float(self.number(abs(value))) == 0

    def signed(self, value: float) -> str:
        """A difference with its sign, unless it is printed as 0."""
        text = self.number(abs(value))
        return text if self.is_zero(value) else ("+" if value > 0 else "−") + text

    def interval(self, record: Record) -> tuple[float, float] | None:
        """The ends of a record's interval; None if it has none that is valid.

        Intervals of ECE from older versions, which wrote no `ece_if_calibrated`, are not valid.
        """
        if self == ECE and not CALIBRATED.of(record):
            return None
        metric = self.of(record)
        low = metric.get("low")
        high = metric.get("high")
        if low is None or high is None or not math.isfinite(low + high):
            return None
        return low, high

    def with_interval(self, record: Record) -> Cell:
        """A record's value and interval; of a calibrated model's ECE, the range and p too."""
        metric = self.of(record)
        value = self.number(metric.get("value"))
        ends = self.interval(record)
        if ends is None:
            return Cell(value)
        low, high = map(self.number, ends)
        p_value = metric.get("p_value")
        behind = f"[{low}, {high}]" if p_value is None else f"({low}–{high}, p {p_value:.3f})"
        return Cell(value, (behind,))

    def over_seeds(self, values: Sequence[float], seeds: int) -> Cell:
        """Mean ± standard deviation (over n − 1), and n where it is not the number of seeds."""
        if not values:
            return Cell()
        behind = [f"± {self.number(statistics.stdev(values))}"] if len(values) > 1 else []
        behind += [f"({len(values)})"] if len(values) < seeds else []
        return Cell(self.number(statistics.fmean(values)), tuple(behind))

    def block(
        self,
        methods: Sequence[str],
        tasks: Iterable[Mapping[str, Seeds]],
        seeds: int,
        marks: Sequence[Mark] = ("best",),
        title: str = "",
    ) -> Block:
        """A line for each method and a column for each task: means over seeds.

        Marks are among the methods with a column's most seeds: other means are of other fits.
        """
        columns = []
        for task in tasks:
            values = self.values(task)
            cells = {each: self.over_seeds(values.get(each, ()), seeds) for each in methods}
            most = max(map(len, values.values()), default=0)
            ranked = [each for each in methods if len(values.get(each, ())) == most]
            best = marked([cells[each] for each in ranked], self.sign, marks)
            cells |= dict(zip(ranked, best, strict=True))
            columns.append(list(cells.values()))
        return Block.of(title or self.heading, methods, columns)


@dataclass(frozen=True)
class GateColumn(Column):
    """A figure of a record's gate, which older records do not have."""

    def of(self, record: Record) -> Mapping[str, Any]:
        """The value in a record; empty if it has none."""
        value = record.get("gate", {}).get(self.key)
        return {} if value is None else {"value": value}


ACCURACY = Column("accuracy", "ACC %", 100, 1, 1)
ECE = Column("ece", "ECE %", 100, 1, -1)
CALIBRATED = Column("ece_if_calibrated", "ECE if calibrated %", 100, 1, 0)
NLL = Column("nll", "NLL", 1, 3, -1)
BRIER = Column("brier", "Brier", 1, 3, -1)
AURC = Column("aurc", "AURC", 1, 3, -1)

GATE = (
    GateColumn("wrong_at_80", "wrong ≥ 0.8", 1, 0, -1),
    GateColumn("wrong_at_90", "wrong ≥ 0.9", 1, 0, -1),
    GateColumn("acted_at_90", "rows ≥ 0.9", 1, 0, 0),
    GateColumn("confidently_wrong", "confidently wrong %", 100, 1, -1),
    GateColumn("coverage_at_risk_5", "cov@5 % risk", 100, 1, 1),
    GateColumn("risk_at_coverage_80", "risk@80 % cov", 100, 1, -1),
    GateColumn("aurc", "AURC", 1, 3, -1),
    GateColumn("augrc", "AUGRC", 1, 3, -1),
    GateColumn("acted", "acted on %", 100, 1, 0),
    GateColumn("risk", "wrong of these %", 100, 1, 0),
    GateColumn("cost", "cost of these %", 100, 1, 0),
)
