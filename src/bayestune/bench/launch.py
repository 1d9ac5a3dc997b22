"""Runs the cells of a grid, here one after the other or spread by Ray; finished ones are skipped."""

import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from bayestune.bench.grid import Cell, Grid
from bayestune.bench.store import FITS, collect, read_cell, write_plan
from bayestune.bench.worker import State, Worker

logger = logging.getLogger(__name__)

Launcher = Literal["local", "ray"]
PAUSE, LONGEST_PAUSE = 2.0, 60.0  # seconds between looks at cells that other processes compute


class Progress:
    """Says when a cell starts and ends, and how long the rest may take by the seconds of like cells.

    Args:
        folder: of the results.
        cells: all of the grid.
    """

    def __init__(self, folder: Path, cells: Sequence[Cell]) -> None:
        self.folder, self.cells = folder, cells
        self._seconds = {
            cell.key: seconds for cell in cells if (seconds := self._taken(cell)) is not None
        }

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
        logger.info(
            "[%d/%d] %s starts, %s", len(self._seconds), len(self.cells), cell.title, self.left()
        )

    def ended(self, cell: Cell, state: State) -> None:
        """A cell ended, or is known to be finished."""
        if state in ("computed", "finished"):
            self._seconds[cell.key] = seconds = self._taken(cell) or 0.0
            done = (len(self._seconds), len(self.cells))
            logger.info(
                "[%d/%d] %s %s, %s; %s", *done, cell.title, state, _span(seconds), self.left()
            )


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
    workshop = Worker(grid, folder)
    write_plan(folder, [cell.key for cell in workshop.cells])
    chosen = [
        cell
        for cell in workshop.cells
        if cell.task in (only_tasks or grid.tasks) and cell.name in (only_methods or grid.methods)
    ]
    progress = Progress(folder, chosen)
    failed = (
        run_local(workshop, progress) if launcher == "local" else _run_ray(workshop, progress, grid)
    )
    collect(folder)
    if failed:
        logger.error("%d of %d cells failed; run again to try them again", len(failed), len(chosen))
        return 1
    logger.info("all %d cells finished; see them with: bayestune table %s", len(chosen), folder)
    if discard_fits:
        shutil.rmtree(folder / FITS, ignore_errors=True)
    return 0


def _run_ray(workshop: Worker, progress: Progress, grid: Grid) -> list[Cell]:

    return run_ray(workshop, progress, grid)


def run_local(workshop: Worker, progress: Progress) -> list[Cell]:
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


_HELD: dict[
    str, Worker
] = {}  # of this worker process, so that its next cell finds the model loaded


def run_ray(workshop: Worker, progress: Progress, grid: Grid) -> list[Cell]:
    """Every unfinished cell becomes a Ray task, on a GPU of its own where the cluster has any. Gives the failed ones.

    A cell whose fit another one is making comes back at once and is handed out again.

    Raises:
        ImportError: if Ray is not installed.
    """
    try:
        import ray  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError(
            "got the launcher 'ray', expected ray to be installed: pip install 'bayestune[ray]'"
        ) from error
    ray.init(ignore_reinit_error=True)
    task = ray.remote(num_gpus=1 if ray.cluster_resources().get("GPU") else 0)(attempt_key)
    running: dict[Any, Cell] = {}

    def hand_out(cell: Cell) -> None:
        running[task.remote(grid, workshop.folder.resolve(), cell.key)] = cell

    for cell in progress.todo():
        hand_out(cell)
    logger.info("handed out %d cells, %s by one worker", len(running), progress.left())
    failed = []
    while running:
        (reference, *_), _ = ray.wait(list(running), num_returns=1)
        cell, state = running.pop(reference), _outcome(ray, reference)
        progress.ended(cell, state)
        failed += [cell] if state == "failed" else []
        if state == "busy":
            time.sleep(PAUSE)
            hand_out(cell)
    return failed


def _outcome(ray: Any, reference: Any) -> State:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError:  # the worker died, for lack of memory or with its machine
        return "failed"


def attempt_key(grid: Grid, folder: Path, key: str) -> State:
    """Computes the cell of that key, in a worker process."""
    name = f"{folder} {grid}"
    if name not in _HELD:
        _HELD.clear()
        _HELD[name] = Worker(grid, folder)
    workshop = _HELD[name]
    return workshop.attempt(next(cell for cell in workshop.cells if cell.key == key))
