"""Computes one cell: fits, evaluates, writes its records."""

import json
import logging
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from bayestune.adapters import Slots, detach
from bayestune.bench.grid import Cell, Grid, cells, lasting
from bayestune.bench.store import CELLS, LOCKS, ROWS, Busy, Cached, cell_file, claimed
from bayestune.data import Task
from bayestune.evaluation import evaluate_posterior, label_of, make_record, prediction_rows
from bayestune.jsonl import write_json_lines
from bayestune.methods import METHODS, described
from bayestune.models import LoadedModel
from bayestune.posteriors import Posterior
from bayestune.scoring import Scorer, make_scorer
from bayestune.session import classes_of, open_model, shown

logger = logging.getLogger(__name__)


def compute_cell(
    cell: Cell, folder: Path, loaded: LoadedModel, tasks: Mapping[str, Task]
) -> list[dict[str, Any]]:
    """Fits and evaluates a cell and writes its records; the model is given back without adapters.

    Args:
        cell: what to compute.
        folder: of the results.
        loaded: the cell's model.
        tasks: by name, the cell's among them.

    Returns:
        The records, one for each evaluated task and number of draws.
    """
    begin = time.perf_counter()
    task = tasks[cell.task]
    scorer = _scorer(cell, loaded, task)
    method = Cached(cell.method, folder, loaded.name, cell.context, cell.questions)
    posterior = method.fit(loaded.model, scorer, cell.training)
    records = []
    for name in cell.evaluate_on:
        other = _scorer(cell, loaded, tasks[name])
        records += _evaluated(
            cell, folder, loaded, posterior.on(other), other, len(task.train), begin
        )
    (folder / CELLS).mkdir(parents=True, exist_ok=True)
    write_json_lines(
        cell_file(folder, cell.key), [json.loads(json.dumps(r, default=str)) for r in records]
    )
    detach(posterior.model)
    return records


def _scorer(cell: Cell, loaded: LoadedModel, task: Task) -> Scorer:
    return make_scorer(
        loaded.model, loaded.tokenizer, task, cell.questions.scoring, cell.questions.max_length
    )


def _evaluated(
    cell: Cell,
    folder: Path,
    loaded: LoadedModel,
    posterior: Posterior,
    scorer: Scorer,
    train_rows: int,
    begin: float,
) -> list[dict[str, Any]]:
    records, task, rows = [], scorer.task, scorer.task.evaluation
    bf16 = cell.training.bf16
    for draws, prediction, seconds in evaluate_posterior(
        posterior, scorer, rows, cell.predicting, bf16=bf16, progress=False
    ):
        predictions = f"{ROWS}/{cell.key}-{task.name}-{draws}.jsonl"
        (folder / ROWS).mkdir(parents=True, exist_ok=True)
        write_json_lines(
            folder / predictions, prediction_rows(rows, prediction, texts=cell.predicting.texts)
        )
        facts = {
            **_facts(cell, loaded),
            "train_rows": train_rows,
            "task": task.name,
            "draws": draws,
            "label": label_of(label(cell), draws, posterior, cell.predicting.shared_prefix),
            "seconds": {
                "fit": round(posterior.report.seconds, 1),
                "predict": round(seconds, 1),
                "cell": round(time.perf_counter() - begin, 1),
            },
        }
        records.append(make_record(facts, rows, prediction, cell.predicting, predictions))
    return records


def label(cell: Cell) -> str:
    """The entry's own name; the method's proper name where the entry is called as the method is."""
    return (
        METHODS[cell.name].__name__ if cell.name == described(cell.method)["method"] else cell.name
    )


def _facts(cell: Cell, loaded: LoadedModel) -> dict[str, Any]:
    questions = asdict(cell.questions)
    return {
        "cell": cell.key,
        "trained_on": cell.task,
        "rows": "evaluation",
        "model": shown(loaded.name),
        "method": cell.name,
        "name": METHODS[described(cell.method)["method"]].__name__,
        "scoring": cell.questions.scoring,
        "seed": cell.training.seed,
        "config": {
            "method": described(cell.method),
            "training": lasting(cell.training),
            "questions": {
                key: value.name if isinstance(value, Path) else value
                for key, value in questions.items()
            },
            "predicting": lasting(cell.predicting),
            "dtype": cell.dtype,
        },
    }


State = Literal["finished", "computed", "busy", "failed"]
FAILED = "failed"


class Worker:
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
            if self._held and Slots(self._held[1].model).layers:  # left by a fit that was given up
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
