"""Runs the unfinished cells of a grid, one after the other here or spread by Ray."""

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from bayestune.bench.cells import Cell, Grid
from bayestune.bench.store import FITS, collect, write_plan
from bayestune.bench.weights import check_weights
from bayestune.bench.worker import Progress, State, Worker
from bayestune.errors import Refusal, nearest
from bayestune.posteriors import DETAILS

logger = logging.getLogger(__name__)

Launcher = Literal["local", "ray"]
PAUSE = 2.0  # seconds until cells that other processes compute are looked at again
LONGEST_PAUSE = 60.0


def run_bench(
    grid: Grid,
    folder: Path,
    *,
    launcher: Launcher = "local",
    only_tasks: Sequence[str] = (),
    only_methods: Sequence[str] = (),
    discard_fits: bool = False,
) -> int:
    """Computes what is missing of a grid, then writes `records.jsonl`.

    Args:
        grid: what to run.
        folder: of the results; a run goes on where an earlier one stopped, or beside one that runs.
        launcher: "local" for this process, "ray" for tasks of a Ray cluster that shares the folder.
        only_tasks: compute the cells of these tasks only; all if empty.
        only_methods: likewise for the entries of `methods`.
        discard_fits: remove the saved posteriors when all cells are finished.

    Returns:
        1 if a cell failed, else 0.

    Raises:
        Refusal: if a task or method is not in the grid, a cell's fit or evaluation would be refused
            later, or the folder has results of other weights under a model's name.
        ImportError: if `launcher` is "ray" and ray is not installed.
    """
    _refuse_unknown("tasks", only_tasks, grid.tasks)
    _refuse_unknown("methods", only_methods, grid.methods)
    worker = Worker(grid, folder)
    check_weights(folder, grid.models)
    write_plan(folder, [cell.key for cell in worker.cells])
    tasks = only_tasks or grid.tasks
    methods = only_methods or grid.methods
    chosen = [cell for cell in worker.cells if cell.task in tasks and cell.name in methods]
    run = run_local if launcher == "local" else run_ray
    progress = Progress(folder, chosen)
    worker.check(progress.todo())
    failed = run(worker, progress)
    collect(folder)
    if failed:
        logger.error("%d of %d cells failed; run again to try them again", len(failed), len(chosen))
        return 1
    logger.info("all %d cells finished; see them with: bayestune table %s", len(chosen), folder)
    if discard_fits:
        discard(folder / FITS)
    return 0


def discard(fits: Path) -> None:
    """Removes saved posteriors from a folder, and nothing else."""
    for path in fits.iterdir() if fits.is_dir() else ():
        if (path / DETAILS).is_file():
            shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # it holds something else
        fits.rmdir()


def _refuse_unknown(what: str, given: Sequence[str], known: Mapping[str, Any]) -> None:
    if unknown := sorted(set(given) - set(known)):
        alike = nearest(unknown[0], known)
        hint = f"did you mean {alike!r}?" if alike else "correct the names"
        expected = f"expected some of {sorted(known)}; {hint}"
        raise Refusal(f"{what} to run that are not in the grid: got {unknown}, {expected}")


def run_local(worker: Worker, progress: Progress) -> list[Cell]:
    """Computes one cell after the other; returns those that failed."""
    failed: list[Cell] = []
    waiting = progress.todo()
    pause = PAUSE
    while waiting:
        busy = []
        for cell in waiting:
            state = worker.compute(cell, progress.started)
            progress.ended(cell, state)
            if state == "failed":
                failed.append(cell)
            elif state == "busy":
                busy.append(cell)
        if len(busy) < len(waiting):
            pause = PAUSE
        else:
            logger.info("waiting for %d cells that another process computes", len(busy))
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        waiting = busy
    return failed


def run_ray(worker: Worker, progress: Progress) -> list[Cell]:
    """Makes a Ray task of every unfinished cell; returns those that failed.

    A task has a GPU of its own if the cluster has any. A busy cell is handed out again.
    """
    try:
        import ray  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError(
            "got the launcher 'ray', expected ray to be installed: pip install 'bayestune[ray]'"
        ) from error
    ray.init(ignore_reinit_error=True)
    task = ray.remote(num_gpus=1 if ray.cluster_resources().get("GPU") else 0)(compute_key)
    run = partial(task.remote, worker.grid, worker.folder.resolve())
    running: dict[Any, Cell] = {run(cell.key): cell for cell in progress.todo()}
    logger.info("handed out %d cells, %s by one worker", len(running), progress.left())
    failed: list[Cell] = []
    while running:
        (reference, *_), _ = ray.wait(list(running), num_returns=1)
        cell = running.pop(reference)
        state = _outcome(ray, reference)
        progress.ended(cell, state)
        if state == "failed":
            failed.append(cell)
        elif state == "busy":
            time.sleep(PAUSE)
            running[run(cell.key)] = cell
    return failed


def _outcome(ray: Any, reference: Any) -> State:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError:  # the worker died, for lack of memory or with its machine
        return "failed"


# The one worker of a Ray worker's process, kept so that its next cell finds the model loaded.
_WORKERS: dict[str, Worker] = {}


def compute_key(grid: Grid, folder: Path, key: str) -> State:
    """Computes the cell of a key in a worker process."""
    name = f"{folder} {grid}"
    if name not in _WORKERS:
        _WORKERS.clear()
        _WORKERS[name] = Worker(grid, folder)
    worker = _WORKERS[name]
    return worker.compute(next(cell for cell in worker.cells if cell.key == key))
