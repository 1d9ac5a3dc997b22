"""Methods trained on OpenBookQA and evaluated elsewhere: how accuracy and uncertainty hold."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from bayestune.errors import Refusal
from bayestune.metrics import SCORES, Row, error_auroc, is_right, shift_auroc, uncertainty
from bayestune.report.columns import ACCURACY, ECE, NLL, Column
from bayestune.report.comparable import Seeds, by_seed, caption, comparable, differing, label_of
from bayestune.report.figures import Runs, risk_coverage_figure
from bayestune.report.picture_style import save_figure
from bayestune.report.rows import Record, read_rows
from bayestune.report.table import Table, render

SOURCE = "openbookqa"
# What a task is called, and how far it is from the questions of SOURCE; in the order of columns.
_TASKS = {
    SOURCE: ("OBQA", "in domain"),
    "arc_challenge": ("ARC-C", "small shift"),
    "arc_easy": ("ARC-E", "small shift"),
    "mmlu_chemistry": ("Chem", "large shift"),
    "mmlu_physics": ("Phy", "large shift"),
}
_DASHES = (
    "–: no rows, all right or all wrong, or a score that is the same for every row, as the mutual "
    "information of a single draw."
)
_RIGHT = "Right or wrong: AUROC % ↑ of each score for errors, 50 is a coin flip"
_DOMAIN = (
    "In-domain or not: AUROC % ↑ of each score (as a share of its most for the row's options) for "
    "the task's rows against those of OBQA, 50 is a coin flip"
)


@dataclass(frozen=True)
class _Study:
    """The comparable records that one set of tables is of.

    To each record are added its "rows", and AUROCs among its metrics.

    Args:
        first: one of the records, for what all have in common.
        methods: labels.
        num_seeds: of all methods together.
        tasks: task → method → seed → record, in the order of columns.
    """

    first: Record
    methods: list[str]
    num_seeds: int
    tasks: dict[str, dict[str, Seeds]]

    @classmethod
    def of(cls, group: Sequence[Record], folder: str | Path) -> "_Study":
        with_rows = [{**record, "rows": read_rows(record, folder)} for record in group]
        in_domain = by_seed(record for record in with_rows if record.get("task") == SOURCE)
        tasks: dict[str, list[Record]] = {task: [] for task in _TASKS}
        for record in with_rows:
            tasks.setdefault(str(record.get("task")), []).append(_ranked(record, in_domain))
        runs = {}
        for task, records in tasks.items():
            if records or task == SOURCE:
                runs[task] = by_seed(records)
        num_seeds = len({record.get("seed") for record in group})
        return cls(group[0], list(by_seed(group)), num_seeds, runs)


def _ranked(record: Record, in_domain: Mapping[str, Seeds]) -> Record:
    """The record with the AUROC of each score for errors, and against in-domain rows."""
    rows = record["rows"]
    familiar = in_domain.get(label_of(record), {}).get(record.get("seed"), {}).get("rows")
    metrics = dict(record.get("metrics", {}))
    for score in SCORES:
        if _varies(rows, score) and len(is_right(rows).unique()) > 1:
            metrics[f"error {score}"] = {"value": error_auroc(rows, score)}
        if rows and familiar and _varies(rows + familiar, score):
            metrics[f"shift {score}"] = {"value": shift_auroc(rows, familiar, score)}
    return {**record, "metrics": metrics}


def _varies(rows: Sequence[Row], score: str) -> bool:
    return len(uncertainty(rows, score).unique()) > 1


def _heading(task: str) -> str:
    name, shift = _TASKS.get(task, (task, "shifted"))
    return f"{name} ({shift})"


def _caption(study: _Study) -> str:
    """The caption of a study's tables, with all numbers of rows where they differ."""
    counts = []
    for task, methods in study.tasks.items():
        name, _ = _TASKS.get(task, (task, ""))
        runs = chain.from_iterable(seeds.values() for seeds in methods.values())
        numbers = dict.fromkeys(str(record.get("n", "?")) for record in runs)
        counts += [f"{name} {' or '.join(numbers)}"] if numbers else []
    return caption(study.first, "trained on OBQA", ", ".join(counts))


def _auroc_table(study: _Study, tasks: Iterable[str], title: str, kind: str) -> Table:
    """The AUROC of each score on some tasks; `kind` is "error" or "shift", see `_ranked`."""
    blocks = []
    for score in SCORES:
        name = score.replace("_", " ").replace("one minus", "1 −")
        runs = [study.tasks[task] for task in tasks]
        auroc = Column(f"{kind} {score}", name, 100, 1, 1)
        blocks.append(auroc.block(study.methods, runs, study.num_seeds, title=name))
    return Table(title, tuple(map(_heading, tasks)), tuple(blocks), heads=("Score", "Method"))


def _tables(study: _Study) -> list[Table]:
    runs = study.tasks.values()
    blocks = [column.block(study.methods, runs, study.num_seeds) for column in (ACCURACY, ECE, NLL)]
    several = f"Mean ± standard deviation over {study.num_seeds} seeds; (k): of k seeds only."
    notes = (f"{several if study.num_seeds > 1 else 'One seed.'} {_DASHES}",)
    headings = tuple(map(_heading, study.tasks))
    metrics = Table(_caption(study), headings, tuple(blocks), notes, ("Metric", "Method"))
    tables = [metrics, _auroc_table(study, study.tasks, _RIGHT, "error")]
    shifted = [task for task in study.tasks if task != SOURCE]
    return [*tables, _auroc_table(study, shifted, _DOMAIN, "shift")] if shifted else tables


def _panels(studies: Sequence[_Study]) -> dict[str, dict[str, Runs]]:
    """Title of a panel → method → its rows of each seed that has them."""
    keys = differing([study.first for study in studies])
    panels: dict[str, dict[str, Runs]] = {}
    for study in studies:
        differences = [str(study.first.get(key)) for key in keys]
        for task, methods in study.tasks.items():
            title = " · ".join([*differences, _heading(task)])
            for method, seeds in methods.items():
                runs = [record["rows"] for record in seeds.values() if record["rows"]]
                if runs:
                    panels.setdefault(title, {})[method] = runs
    return panels


def _trained_on_source(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if (r.get("trained_on") or r.get("task")) == SOURCE]


def has_shift(records: Sequence[Record]) -> bool:
    """Whether a method trained on OpenBookQA is evaluated on another task."""
    return any(record.get("task") != SOURCE for record in _trained_on_source(records))


def write_shift(records: Sequence[Record], folder: str | Path) -> list[Path]:
    """Writes `shift.md`, and `risk_coverage.png` if there are any rows; returns their paths.

    Three tables with a column for each task: accuracy, ECE and NLL; the AUROC of each uncertainty
    score for errors; the AUROC of each score for the task's rows against in-domain rows of the same
    method and seed. Cells are means over seeds ± their standard deviation (over n − 1); the best
    mean is marked, whether or not the difference is more than noise.

    Args:
        records: those of methods trained on another task than OpenBookQA are left out.
        folder: where the records' rows are, and where the files are written.

    Raises:
        Refusal: if no records are left.
    """
    of_source = _trained_on_source(records)
    if not of_source:
        got = f"no records of methods trained on {SOURCE!r} among {len(records)}"
        raise Refusal(f"got {got}; expected some; run `bayestune bench` with this task first")
    studies = [_Study.of(group, folder) for group in comparable(of_source, same_task=False)]
    tables = chain.from_iterable(map(_tables, studies))
    path = Path(folder) / "shift.md"
    path.write_text(render(list(tables), "markdown") + "\n", encoding="utf-8")
    panels = _panels(studies)
    if not panels:
        return [path]
    return [path, save_figure(risk_coverage_figure(panels), path.with_name("risk_coverage.png"))]
