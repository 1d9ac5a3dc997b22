"""Runs the cells of a grid: here one after the other, or spread by Ray; what is finished is passed over."""

import logging
import shutil
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from bayestune.benchmark.cells import cell_file, collect, compute_cell, read_cell, write_plan
from bayestune.benchmark.fits import FITS, LOCKS, Busy, claimed
from bayestune.benchmark.grid import Cell, Grid, cells
from bayestune.lora import adapted_layers
from bayestune.models import LoadedModel
from bayestune.runs import classes_of, open_model
from bayestune.tasks import Task

logger = logging.getLogger(__name__)

Launcher = Literal["local", "ray"]
State = Literal["finished", "computed", "busy", "failed"]
FAILED = "failed"
PAUSE, LONGEST_PAUSE = 2.0, 60.0  # seconds between looks at cells that other processes compute


class Workshop:
    """Computes cells of one grid in this process, and keeps the rows and the model in between.

    Args:
        grid: what to run.
        folder: of the results.
    """

    def __init__(self, grid: Grid, folder: Path) -> None:
        self.folder = folder
        self.tasks: dict[str, Task] = grid.load_all()
        self.cells = cells(grid, self.tasks)
        self._held: tuple[tuple[Any, ...], LoadedModel] | None = None

    def attempt(self, cell: Cell, starts: Callable[[Cell], None] | None = None) -> State:
        """Computes a cell unless it is finished or another process is at it; says what became of it.

        Args:
            cell: one of `cells`.
            starts: is told when the work begins.
        """
        try:
            with claimed(self.folder / LOCKS, f"cell-{cell.key}"):
                if cell_file(self.folder, cell.key).is_file():
                    return "finished"
                if starts:
                    starts(cell)
                compute_cell(cell, self.folder, self._model(cell), self.tasks)
        except Busy:
            if self._held and adapted_layers(self._held[1].model):  # left by a fit that was given up
                self._held = None
            return "busy"
        except Exception as error:  # one cell must not stop the others
            self._held = None
            self._report(cell, error)
            return "failed"
        self._note(cell).unlink(missing_ok=True)
        return "computed"

    def _model(self, cell: Cell) -> LoadedModel:
        wanted = (cell.model, cell.dtype, classes_of(self.tasks[cell.task], cell.questions.scoring))
        if self._held is None or self._held[0] != wanted:
            self._held = None  # frees the old one first
            self._held = (wanted, open_model(*wanted))
        return self._held[1]

    def _note(self, cell: Cell) -> Path:
        return self.folder / FAILED / f"{cell.key}.txt"

    def _report(self, cell: Cell, error: Exception) -> None:
        note = self._note(cell)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        reason = next(iter(str(error).splitlines()), "")
        logger.error("%s failed: %s: %s (see %s)", cell.title, type(error).__name__, reason, note)


class Progress:
    """Says when a cell starts and ends, and how long the rest may take by the seconds of like cells.

    Args:
        folder: of the results.
        cells: all of the grid.
    """

    def __init__(self, folder: Path, cells: Sequence[Cell]) -> None:
        self.folder, self.cells = folder, cells
        self._seconds = {cell.key: seconds for cell in cells if (seconds := self._taken(cell)) is not None}

    def _taken(self, cell: Cell) -> float | None:
        records = read_cell(self.folder, cell.key)
        return max(record["seconds"]["cell"] for record in records) if records else None

    def todo(self) -> list[Cell]:
        """The cells that have not been seen finished."""
        return [cell for cell in self.cells if cell.key not in self._seconds]

    def left(self) -> str:
        """An estimate of the time that the unfinished cells take one after the other."""
        known: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for cell in self.cells:
            if cell.key in self._seconds:
                for like in ((), (cell.name,), (cell.name, cell.task)):
                    known[like].append(self._seconds[cell.key])
        if not known:
            return "time left unknown"
        total = 0.0
        for cell in self.todo():
            times = known.get((cell.name, cell.task)) or known.get((cell.name,)) or known[()]
            total += sum(times) / len(times)
        return f"about {_span(total)} left"

    def started(self, cell: Cell) -> None:
        """A cell begins."""
        logger.info("[%d/%d] %s starts, %s", len(self._seconds), len(self.cells), cell.title, self.left())

    def ended(self, cell: Cell, state: State) -> None:
        """A cell ended, or is known to be finished."""
        if state in ("computed", "finished"):
            self._seconds[cell.key] = seconds = self._taken(cell) or 0.0
            done = (len(self._seconds), len(self.cells))
            logger.info("[%d/%d] %s %s, %s; %s", *done, cell.title, state, _span(seconds), self.left())


def _span(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def run_bench(
    grid: Grid,
    folder: Path,
    *,
    launcher: Launcher = "local",
    only_tasks: Sequence[str] = (),
    only_methods: Sequence[str] = (),
    discard_fits: bool = False,
) -> int:
    """`bayestune bench`: computes what is missing of a grid, then writes `records.jsonl`.

    Args:
        grid: what to run.
        folder: of the results; a run goes on where an earlier one stopped, or beside one that runs.
        launcher: "local" for this process, "ray" for tasks of a Ray cluster that shares the folder.
        only_tasks: cells of these tasks only, where given.
        only_methods: cells of these entries only, where given.
        discard_fits: remove the saved posteriors when all cells are finished.

    Returns:
        1 if a cell failed, else 0.
    """
    workshop = Workshop(grid, folder)
    write_plan(folder, [cell.key for cell in workshop.cells])
    chosen = [
        cell
        for cell in workshop.cells
        if cell.task in (only_tasks or grid.tasks) and cell.name in (only_methods or grid.methods)
    ]
    progress = Progress(folder, chosen)
    failed = run_local(workshop, progress) if launcher == "local" else _run_ray(workshop, progress, grid)
    collect(folder)
    if failed:
        logger.error("%d of %d cells failed; run again to try them again", len(failed), len(chosen))
        return 1
    logger.info("all %d cells finished; see them with: bayestune table %s", len(chosen), folder)
    if discard_fits:
        shutil.rmtree(folder / FITS, ignore_errors=True)
    return 0


def _run_ray(workshop: Workshop, progress: Progress, grid: Grid) -> list[Cell]:
    from bayestune.benchmark.ray import run_ray

    return run_ray(workshop, progress, grid)


def run_local(workshop: Workshop, progress: Progress) -> list[Cell]:
    """One cell after the other; those that other processes compute are waited for at the end. Gives the failed ones."""
    failed, waiting, pause = [], progress.todo(), PAUSE
    while waiting:
        passed = []
        for cell in waiting:
            state = workshop.attempt(cell, progress.started)
            progress.ended(cell, state)
            failed += [cell] if state == "failed" else []
            passed += [cell] if state == "busy" else []
        if len(passed) == len(waiting):
            logger.info("waiting for %d cells that another process computes", len(passed))
            time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE) if len(passed) == len(waiting) else PAUSE
        waiting = passed
    return failed
