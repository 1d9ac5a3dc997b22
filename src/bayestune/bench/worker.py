"""Computes cells: fits, evaluates, writes records; says how far a run is."""

import hashlib
import logging
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from bayestune.adapters import Slots, detach
from bayestune.bench.cells import Cell, Grid
from bayestune.bench.store import LOCKS, ROWS, Busy, Kept, cell_file, claimed, read_cell
from bayestune.data import Task
from bayestune.evaluation import Record
from bayestune.models import LoadedModel
from bayestune.session import Session, num_classes, open_model
from bayestune.whole_files import write_json_lines

logger = logging.getLogger(__name__)

FAILED = "failed"
State = Literal["finished", "computed", "busy", "failed"]


def compute_cell(
    cell: Cell,
    session: Session,
    tasks: Mapping[str, Task],
    folder: Path,
    facts: Mapping[str, Any] | None = None,
) -> list[Record]:
    """Fits and evaluates a cell and writes its records, one for each task and number of draws.

    Args:
        cell: what to compute.
        session: with the cell's task and its model, which is left without adapters.
        tasks: by name, all that the cell is evaluated on.
        folder: of the results.
        facts: added to every record.

    Returns:
        The records.
    """
    begin = time.perf_counter()
    fit = Kept(cell.method, session, folder, cell.context).fitted(cell.training)
    fit = replace(fit, label=cell.label)
    records = []
    for name in cell.evaluate_on:
        for result in session.on(tasks[name]).evaluate(fit, cell.predicting, cell.part):
            file = f"{ROWS}/{cell.key}-{name}-{result.record['draws']}.jsonl"
            record = result.keep_rows(folder, file)
            record["seconds"]["cell"] = round(time.perf_counter() - begin, 1)
            records.append({"cell": cell.key, "trained_on": cell.task, **(facts or {}), **record})
    file = cell_file(folder, cell.key)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(file, records)
    detach(fit.posterior.model)
    return records


class Worker:
    """Computes cells of a grid in this process; keeps the rows and the model in between."""

    def __init__(self, grid: Grid, folder: Path) -> None:
        self.grid = grid
        self.folder = folder
        self.tasks = grid.load_all()
        self.cells = grid.cells(self.tasks)
        self._facts: dict[str, Any] = {}
        if grid.protocol is not None:
            self._facts["protocol"] = hashlib.sha256(grid.protocol.read_bytes()).hexdigest()
        self._held: tuple[tuple[Any, ...], LoadedModel] | None = None  # and what it was opened by

    def compute(self, cell: Cell, starting: Callable[[Cell], None] | None = None) -> State:
        """Computes a cell unless it is finished or busy; a failure is logged and noted in a file.

        Args:
            cell: one of the grid's.
            starting: called with the cell when the work begins.

        Returns:
            "finished" if it was already, "computed", "busy" if another process computes it or a fit
            that it needs, or "failed".
        """
        try:
            with claimed(self.folder / LOCKS, f"cell-{cell.key}"):
                if cell_file(self.folder, cell.key).is_file():
                    return "finished"
                if starting:
                    starting(cell)
                tasks = self.tasks[cell.training.seed]
                compute_cell(cell, self._session(cell), tasks, self.folder, self._facts)
        except Busy:
            # a fit that was given up may have left its adapter on the model
            if self._held and Slots(self._held[1].model).layers:
                self._held = None
            return "busy"
        except Exception as error:  # one cell must not stop the others
            self._held = None
            self._report(cell, error)
            return "failed"
        self._note(cell).unlink(missing_ok=True)
        return "computed"

    def check(self, cells: Iterable[Cell]) -> None:
        """Refuses now what fitting or evaluating the cells would refuse only after hours.

        Models are opened without their weights, once for each task and seed.
        """
        groups: dict[tuple[Any, ...], list[Cell]] = defaultdict(list)
        for cell in cells:
            groups[cell.model, cell.task, cell.training.seed].append(cell)
        for (model, task, seed), group in groups.items():
            tasks = self.tasks[seed]
            first = group[0]
            classes = num_classes(tasks[task], first.questions.scoring)
            loaded = open_model(model, first.dtype, classes, outline=True)
            session = Session.of(loaded, tasks[task], first.questions).quietly()
            for name in first.evaluate_on:
                session.on(tasks[name]).check_evaluation(first.part)
            session.check([cell.method for cell in group], first.training)

    def _session(self, cell: Cell) -> Session:
        task = self.tasks[cell.training.seed][cell.task]
        wanted = (cell.model, cell.dtype, num_classes(task, cell.questions.scoring))
        if self._held is None or self._held[0] != wanted:
            self._held = None  # frees the old one first
            self._held = (wanted, open_model(*wanted))
        return Session.of(self._held[1], task, cell.questions, progress=False)

    def _note(self, cell: Cell) -> Path:
        return self.folder / FAILED / f"{cell.key}.txt"

    def _report(self, cell: Cell, error: Exception) -> None:
        note = self._note(cell)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        reason = next(iter(str(error).splitlines()), "")
        logger.error("%s failed: %s: %s (see %s)", cell.title, type(error).__name__, reason, note)


class Progress:
    """Logs when cells start and end, and estimates the time left from that of similar cells."""

    def __init__(self, folder: Path, cells: Sequence[Cell]) -> None:
        self.folder = folder
        self.cells = cells
        self._seconds: dict[str, float] = {}
        for cell in cells:
            self._note(cell)

    def _note(self, cell: Cell) -> None:
        """Notes the seconds that a cell took, if it is finished."""
        if records := read_cell(self.folder, cell.key):
            self._seconds[cell.key] = max(record["seconds"]["cell"] for record in records)

    def todo(self) -> list[Cell]:
        """The cells that have not been seen finished."""
        return [cell for cell in self.cells if cell.key not in self._seconds]

    def left(self) -> str:
        """An estimate of the time that the unfinished cells take one after the other."""
        measured: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for cell in self.cells:
            if cell.key in self._seconds:
                for group in _groups_of(cell):
                    measured[group].append(self._seconds[cell.key])
        if not measured:
            return "time left unknown"
        total = 0.0
        for cell in self.todo():
            times = next(measured[group] for group in _groups_of(cell) if group in measured)
            total += sum(times) / len(times)
        return f"about {_span(total)} left"

    def started(self, cell: Cell) -> None:
        """Logs that a cell begins."""
        self._say(cell, f"starts, {self.left()}")

    def ended(self, cell: Cell, state: State) -> None:
        """Logs that a cell is finished, unless it failed or is busy."""
        if state in ("computed", "finished"):
            self._note(cell)
            seconds = _span(self._seconds.get(cell.key, 0.0))
            self._say(cell, f"{state}, {seconds}; {self.left()}")

    def _say(self, cell: Cell, what: str) -> None:
        done = len(self._seconds)
        logger.info("[%d/%d] %s %s", done, len(self.cells), cell.title, what)


def _groups_of(cell: Cell) -> list[tuple[str, ...]]:
    """The groups of similar cells that a cell belongs to, from the most to the least similar."""
    return [(cell.name, cell.task), (cell.name,), ()]


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
