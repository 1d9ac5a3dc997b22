"""Records → the paper's table: methods × tasks, a block a metric, mean ± deviation over seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from bayestune.errors import Refusal
from bayestune.metrics import LEVEL, PairedDifference, holm, paired_bootstrap
from bayestune.report.columns import ACCURACY, BRIER, CALIBRATED, ECE, GATE, NLL, Column, GateColumn
from bayestune.report.comparable import by_seed, caption, comparable
from bayestune.report.rows import Record, paired_tensors, read_rows, renewed
from bayestune.report.table import Block, Cell, Table

_BLOCKS = (ACCURACY, ECE, CALIBRATED, NLL, BRIER, *GATE)
_TESTED = (NLL, BRIER, ACCURACY)
_ABOUT_MARKS = (
    "Best and runner-up of a column are marked, among the methods with its most seeds; in brackets "
    "how many seeds where it is not {}."
)
_ABOUT_P = (
    "p: two-sided paired bootstrap over the same questions against {}, losses averaged over the "
    "seeds both have, {} resamples, corrected by Holm for the methods of a column; the seeds are "
    "held. Better or worse only where p < {:.2g}, else a tie."
)
_ABOUT_CHANCE = (
    "log C: the NLL of a guess among each row's options. Where no method is below, the task says "
    "nothing about them."
)


def grid_tables(
    records: Sequence[Record],
    folder: str | Path | None = None,
    resamples: int = 1000,
    against: str | None = None,
) -> list[Table]:
    """One table for each model and way of scoring; best and runner-up of a column are marked.

    Args:
        records: one for each method, task, seed and number of draws; what is missing is a dash.
        folder: where the rows of the records are, for p-values and for what a calibrated model
            scores where a record does not say it; None for none.
        resamples: of the paired bootstrap; 0 for no p-values.
        against: the label of the method to compare with, whose differences are then shown too;
            None for the method of least mean NLL.

    Raises:
        Refusal: if there are no records, or none of `against`.
    """
    records = records if folder is None else renewed(records, folder)
    methods = list(by_seed(records))
    if against is not None and against not in methods:
        raise Refusal(f"got no record of {against!r}; expected one of {methods}; choose one")
    tables = []
    for group in comparable(records, same_task=False):
        labels = list(by_seed(group))
        tasks: dict[str, list[Record]] = {}
        for record in group:
            tasks.setdefault(_task(record), []).append(record)
        runs = [by_seed(of_task) for of_task in tasks.values()]
        num_seeds = max(len(seeds) for of_task in runs for seeds in of_task.values())
        shown = [column for column in _BLOCKS if _is_shown(column, group)]
        blocks = [column.block(labels, runs, num_seeds, ("best", "second")) for column in shown]
        notes = [_ABOUT_MARKS.format(num_seeds)]
        if folder is not None and resamples:
            blocks += _p_blocks(labels, tasks.values(), folder, resamples, against)
            other = against or "the method of least mean NLL"
            notes.append(_ABOUT_P.format(other, resamples, 1 - LEVEL))
        if folder is not None and (guess := _chance(tasks.values(), folder)):
            blocks.insert(shown.index(NLL) + 1, guess)
            notes.append(_ABOUT_CHANCE)
        several = f"mean ± standard deviation over {num_seeds} seeds"
        title = caption(group[0], last=several if num_seeds > 1 else "one seed")
        tables.append(Table(title, tuple(tasks), tuple(blocks), tuple(notes), ("Metric", "Method")))
    return tables


def _is_shown(column: Column, records: Iterable[Record]) -> bool:
    """Whether a block is printed: those that older versions did not write, only if a record has it.

    These are the figures of gates, and the ECE of a calibrated model, which has no better side.
    """
    in_all_versions = column.sign != 0 and not isinstance(column, GateColumn)
    return in_all_versions or any(map(column.of, records))


def _task(record: Record) -> str:
    """The heading of a task's column, such as: openbookqa → arc_easy (n=570)."""
    task = str(record.get("task"))
    source = record.get("trained_on")
    name = task if source in (None, task) else f"{source} → {task}"
    return f"{name} (n={record.get('n', '?')})"


def _p_blocks(
    labels: Sequence[str],
    tasks: Iterable[Sequence[Record]],
    folder: str | Path,
    resamples: int,
    against: str | None,
) -> list[Block]:
    """A block of p-values for each tested metric; with `against`, of differences too."""
    compared = []
    for records in tasks:
        other = against or _least_nll(records)
        compared.append((other, significance(records, folder, other, resamples)))
    blocks = []
    for column in _TESTED:
        columns = []
        for other, differences in compared:
            tests = {label: by_metric[column.key] for label, by_metric in differences.items()}
            cells = _p_cells(column, tests, with_difference=bool(against))
            if tests and not against:
                cells[other] = Cell("best")
            columns.append([cells.get(label, Cell()) for label in labels])
        title = f"p ({column.title.removesuffix(' %')})"
        title = f"{column.title} less {against}'s" if against else title
        blocks.append(Block.of(title, labels, columns))
    return blocks


def _p_cells(
    column: Column, tests: Mapping[str, PairedDifference], *, with_difference: bool
) -> dict[str | None, Cell]:
    """What is printed of each method's difference, its p-value corrected by Holm."""
    cells: dict[str | None, Cell] = {}
    p_values = {label: test.p_value for label, test in tests.items()}
    for label, p_value in holm(p_values).items():
        text = f"{p_value:.3f}"
        if with_difference:
            difference = tests[label].difference
            word = _word(column, difference, p_value)
            text = f"{column.signed(difference)}, p {text}, {word}"
        cells[label] = Cell(text)
    return cells


def _word(column: Column, difference: float, p_value: float) -> str:
    """What may be said of a difference, by its corrected p-value."""
    if p_value >= 1 - LEVEL:
        return "tie"
    return "better" if column.sign * difference > 0 else "worse"


def _chance(tasks: Iterable[Sequence[Record]], folder: str | Path) -> Block | None:
    """The NLL of a guess on each task, from the rows of one record; None without any rows."""
    cells = []
    for records in tasks:
        rows = next(filter(None, (read_rows(record, folder) for record in records)), [])
        guesses = [math.log(len(row["probabilities"])) for row in rows]
        cells.append(Cell(NLL.number(fmean(guesses))) if guesses else Cell())
    if all(cell == Cell() for cell in cells):
        return None
    return Block("log C", (("a guess", tuple(cells)),))


def _least_nll(records: Sequence[Record]) -> str | None:
    """The method of least mean NLL over its seeds; None if no record has an NLL."""
    values = NLL.values(by_seed(records))
    means = {label: fmean(of_method) for label, of_method in values.items() if of_method}
    return min(means, key=means.__getitem__, default=None)


def significance(
    records: Sequence[Record], folder: str | Path, against: str | None, resamples: int = 1000
) -> dict[str, dict[str, PairedDifference]]:
    """Each method against one of them on the same questions of one task, by NLL, Brier, accuracy.

    For a seed that both methods have, d_i is the difference of a question's losses; averaged over
    those seeds it is one number a question, and the questions are resampled. So p is the chance of
    a difference this large among other questions if there were none, for these very fits: seeds are
    held, and p is not corrected for the choice of the best or, here, for the number of methods.

    Args:
        records: of one task.
        folder: where their rows are.
        against: the label of the method that the others are compared with.
        resamples: of the bootstrap.

    Returns:
        By method and metric, that method less `against`; none without a seed or question in common.

    Reference: Davison, Hinkley (1997), ch. 4, https://doi.org/10.1017/CBO9780511802843
    """
    runs = by_seed(records)
    reference = runs.pop(str(against), {})
    differences: dict[str, dict[str, PairedDifference]] = {}
    for label, seeds in runs.items():
        both = [seed for seed in reference if seed in seeds]
        pairs = [(read_rows(seeds[s], folder), read_rows(reference[s], folder)) for s in both]
        paired = paired_tensors([pair for pair in pairs if all(pair)])
        if paired:
            by_metric = {c.key: paired_bootstrap(*paired, c.key, resamples) for c in _TESTED}
            differences[label] = by_metric
    return differences
