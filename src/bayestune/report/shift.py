"""Methods trained on OpenBookQA and evaluated elsewhere: how accuracy and uncertainty hold."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from bayestune.metrics import SCORES, Row, error_auroc, is_right, shift_auroc, uncertainty
from bayestune.report.columns import ACCURACY, ECE, NLL, Column
from bayestune.report.comparable import SETTING, caption, comparable, differing, label_of
from bayestune.report.figures import Runs, risk_coverage_figure
from bayestune.report.rows import Record, read_rows
from bayestune.report.svg import save_figure
from bayestune.report.table import Block, Table, marked, render

SOURCE = "openbookqa"
# What a task is called, and how far it is from the questions of SOURCE; in the order of columns.
_TASKS = {
    SOURCE: ("OBQA", "in domain"),
    "arc_challenge": ("ARC-C", "small shift"),
    "arc_easy": ("ARC-E", "small shift"),
    "mmlu_chemistry": ("Chem", "large shift"),
    "mmlu_physics": ("Phy", "large shift"),
}
_AUROC = Column("auroc", "AUROC %", 100, 1, 1)
_DASHES = (
    "–: no rows, all right or all wrong, or a score that is the same for every row, as the mutual "
    "information of a single draw."
)
_RIGHT = "Right or wrong: AUROC % ↑ of each score for errors, 50 is a coin flip"
_DOMAIN = (
    "In-domain or not: AUROC % ↑ of each score (as a share of its most for the row's options) for "
    "the task's rows against those of OBQA, 50 is a coin flip"
)

_Key = tuple[str, str, str]  # method, task and seed
# Gives the number of a run; None where there is none. A cell is the mean over seeds.
_Measure = Callable[[_Key], float | None]


@dataclass(frozen=True)
class _Study:
    """What one set of tables is of."""

    methods: Sequence[str]
    tasks: Sequence[str]
    seeds: Sequence[str]
    records: Mapping[_Key, Record]
    rows: Mapping[_Key, Sequence[Row]]

    @classmethod
    def of(cls, group: Sequence[Record], folder: str | Path) -> "_Study":
        """A later record of the same method, task and seed takes the place of an earlier one."""
        methods = _methods(group)
        tasks = [str(record.get("task")) for record in group]
        seeds = [str(record.get("seed")) for record in group]
        records = dict(zip(zip(methods, tasks, seeds, strict=True), group, strict=True))
        rows = {key: read_rows(record, folder) for key, record in records.items()}
        ordered = [SOURCE, *(task for task in _TASKS if task in tasks), *tasks]
        return cls(_distinct(methods), _distinct(ordered), _distinct(seeds), records, rows)

    @property
    def first(self) -> Record:
        """A record, for what all have in common."""
        return next(iter(self.records.values()))

    def metric(self, column: Column, key: _Key) -> float | None:
        return column.of(self.records.get(key, {})).get("value")

    def error(self, score: str, key: _Key) -> float | None:
        rows = self.rows.get(key, ())
        ranked = _varies(rows, score) and len(is_right(rows).unique()) > 1
        return error_auroc(rows, score) if ranked else None

    def shift(self, score: str, key: _Key) -> float | None:
        method, _, seed = key
        rows = self.rows.get(key, ())
        familiar = self.rows.get((method, SOURCE, seed), ())
        ranked = rows and familiar and _varies([*rows, *familiar], score)
        return shift_auroc(rows, familiar, score) if ranked else None


def _varies(rows: Sequence[Row], score: str) -> bool:
    return len(uncertainty(rows, score).unique()) > 1


def _distinct(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _methods(group: Sequence[Record]) -> list[str]:
    """The label of each record, with method and draws where a label stands for several."""
    kinds = [(label_of(r), f"{r.get('method')}, {r.get('draws')} draws") for r in group]
    labels = [label for label, _ in set(kinds)]
    return [f"{label} ({kind})" if labels.count(label) > 1 else label for label, kind in kinds]


def _heading(task: str) -> str:
    name, shift = _TASKS.get(task, (task, "shifted"))
    return f"{name} ({shift})"


def _caption(study: _Study) -> str:
    """What the tables are of, with all numbers of rows where they differ."""
    counts = []
    for task in study.tasks:
        of_task = [record for (_, name, _), record in study.records.items() if name == task]
        numbers = _distinct([str(record.get("n", "?")) for record in of_task])
        name, _ = _TASKS.get(task, (task, ""))
        counts += [f"{name} {' or '.join(numbers)}"] if numbers else []
    return caption(study.first, "trained on OBQA", ", ".join(counts))


def _block(
    study: _Study, tasks: Sequence[str], title: str, column: Column, measure: _Measure
) -> Block:
    columns = []
    for task in tasks:
        cells = []
        for method in study.methods:
            values = [measure((method, task, seed)) for seed in study.seeds]
            cells.append(column.over_seeds(values, len(study.seeds)))
        columns.append(marked(cells, column.sign))
    return Block.of(title, study.methods, columns)


def _metrics(study: _Study) -> Table:
    blocks = []
    for column in (ACCURACY, ECE, NLL):
        measure = partial(study.metric, column)
        blocks.append(_block(study, study.tasks, column.heading, column, measure))
    seeds = "One seed."
    if len(study.seeds) > 1:
        number = len(study.seeds)
        seeds = f"Mean ± standard deviation over {number} seeds; (k): of k seeds only."
    notes = (f"{seeds} {_DASHES}",)
    columns = tuple(map(_heading, study.tasks))
    return Table(_caption(study), columns, tuple(blocks), notes, ("Metric", "Method"))


def _ranking(
    study: _Study, tasks: Sequence[str], about: str, measure: Callable[..., float | None]
) -> Table:
    blocks = []
    for score in SCORES:
        title = score.replace("_", " ").replace("one minus", "1 −")
        blocks.append(_block(study, tasks, title, _AUROC, partial(measure, score)))
    columns = tuple(map(_heading, tasks))
    return Table(about, columns, tuple(blocks), heads=("Score", "Method"))


def _tables(study: _Study) -> list[Table]:
    tables = [_metrics(study), _ranking(study, study.tasks, _RIGHT, study.error)]
    others = [task for task in study.tasks if task != SOURCE]
    return [*tables, _ranking(study, others, _DOMAIN, study.shift)] if others else tables


def _panels(studies: Sequence[_Study]) -> dict[str, dict[str, Runs]]:
    """Title of a panel → method → its rows of each seed that has them."""
    firsts = [study.first for study in studies]
    differ = differing(firsts, SETTING)
    panels: dict[str, dict[str, Runs]] = {}
    for study in studies:
        apart = [str(study.first.get(key)) for key in differ]
        for task in study.tasks:
            title = " · ".join([*apart, _heading(task)])
            for method in study.methods:
                runs = [study.rows.get((method, task, seed), ()) for seed in study.seeds]
                if any(runs):
                    panels.setdefault(title, {})[method] = list(filter(None, runs))
    return panels


def _own(records: Sequence[Record]) -> list[Record]:
    """The records of methods trained on SOURCE."""
    return [r for r in records if (r.get("trained_on") or r.get("task")) == SOURCE]


def has_shift(records: Sequence[Record]) -> bool:
    """Whether a method trained on OpenBookQA is evaluated on another task.

    >>> has_shift([{"task": "arc_easy", "trained_on": "openbookqa"}])
    True
    """
    return any(record.get("task") != SOURCE for record in _own(records))


def write_shift(records: Sequence[Record], folder: str | Path) -> list[Path]:
    """Writes `shift.md`, and `risk_coverage.png` if there are any rows, into the records' folder.

    Three tables with a column for each task: accuracy, ECE and NLL; the AUROC of each uncertainty
    score for errors; the AUROC of each score for the task's rows against in-domain rows of the same
    method and seed. Cells are means over seeds ± their standard deviation (of n − 1); the best mean
    is marked, whether or not the difference is more than noise.

    Args:
        records: those of methods trained on another task than OpenBookQA are left out.
        folder: where the records' rows are.

    Returns:
        The paths written.

    Raises:
        ValueError: if no records are left.
    """
    own = _own(records)
    if not own:
        got = f"no records of methods trained on {SOURCE!r} among {len(records)}"
        raise ValueError(f"got {got}; expected some; run `bayestune bench` with this task first")
    studies = [_Study.of(group, folder) for group in comparable(own, same_task=False)]
    tables = chain.from_iterable(map(_tables, studies))
    path = Path(folder) / "shift.md"
    path.write_text(render(list(tables), "markdown") + "\n", encoding="utf-8")
    panels = _panels(studies)
    if not panels:
        return [path]
    return [path, save_figure(risk_coverage_figure(panels), path.with_name("risk_coverage.png"))]
