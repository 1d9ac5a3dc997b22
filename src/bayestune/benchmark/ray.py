"""Spreads cells over a Ray cluster whose machines share the results folder; the driver hands each cell out once."""

import logging
import time
from pathlib import Path
from typing import Any

from bayestune.benchmark.grid import Cell, Grid
from bayestune.benchmark.running import PAUSE, Progress, State, Workshop

logger = logging.getLogger(__name__)

_HELD: dict[str, Workshop] = {}  # of this worker process, so that its next cell finds the model loaded


def run_ray(workshop: Workshop, progress: Progress, grid: Grid) -> list[Cell]:
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
        _HELD[name] = Workshop(grid, folder)
    workshop = _HELD[name]
    return workshop.attempt(next(cell for cell in workshop.cells if cell.key == key))
