"""One cell: fit, evaluate, write. A cell's file appears as a whole, after the files that it names."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bayestune.benchmark.fits import LOCKS, Cached, claimed
from bayestune.benchmark.grid import Cell, lasting, place
from bayestune.commands import label_of
from bayestune.evaluation import RECORDS, evaluate_posterior, make_record, prediction_rows, write_json_lines
from bayestune.lora import detach
from bayestune.methods import METHODS
from bayestune.methods.settings import described
from bayestune.models import LoadedModel
from bayestune.posterior import Posterior
from bayestune.runs import shown
from bayestune.scoring import Scorer, make_scorer
from bayestune.tasks import Task

CELLS, ROWS, PLAN = "cells", "rows", "plan.json"


def cell_file(folder: Path, key: str) -> Path:
    """Where the records of a cell are, once it is finished."""
    return folder / CELLS / f"{key}.jsonl"


def read_cell(folder: Path, key: str) -> list[dict[str, Any]]:
    """The records of a cell; none if it is not finished."""
    path = cell_file(folder, key)
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def compute_cell(cell: Cell, folder: Path, loaded: LoadedModel, tasks: Mapping[str, Task]) -> list[dict[str, Any]]:
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
        records += _evaluated(cell, folder, loaded, rescored(posterior, other), other, len(task.train), begin)
    (folder / CELLS).mkdir(parents=True, exist_ok=True)
    write_json_lines(cell_file(folder, cell.key), [json.loads(json.dumps(r, default=str)) for r in records])
    detach(posterior.model)
    return records


def _scorer(cell: Cell, loaded: LoadedModel, task: Task) -> Scorer:
    return make_scorer(loaded.model, loaded.tokenizer, task, cell.questions.scoring, cell.questions.max_length)


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
        write_json_lines(folder / predictions, prediction_rows(rows, prediction, texts=cell.predicting.texts))
        facts = {
            **_facts(cell, loaded),
            "train_rows": train_rows,
            "task": task.name,
            "draws": draws,
            "label": label_of(label(cell), draws, posterior, cell.predicting.shared_prefix),
            "seconds": {
                "fit": round(posterior.fitted.get("seconds", 0.0), 1),
                "predict": round(seconds, 1),
                "cell": round(time.perf_counter() - begin, 1),
            },
        }
        records.append(make_record(facts, rows, prediction, cell.predicting, predictions))
    return records


def rescored(posterior: Any, scorer: Scorer) -> Any:
    """The same posterior on the questions of another scorer, with whatever it is made of."""
    if hasattr(posterior, "members"):
        return replace(posterior, members=[rescored(member, scorer) for member in posterior.members])
    if hasattr(posterior, "base"):
        return replace(posterior, base=rescored(posterior.base, scorer))
    return replace(posterior, score=scorer)


def label(cell: Cell) -> str:
    """The entry's own name; the method's proper name where the entry is called as the method is."""
    return METHODS[cell.name].__name__ if cell.name == described(cell.method)["method"] else cell.name


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
            "questions": {key: value.name if isinstance(value, Path) else value for key, value in questions.items()},
            "predicting": lasting(cell.predicting),
            "dtype": cell.dtype,
        },
    }


def write_plan(folder: Path, keys: Sequence[str]) -> None:
    """Notes the order of the cells; those of earlier plans stay behind them, unless now computed differently."""
    places = {place(key) for key in keys}
    with claimed(folder / LOCKS, "plan", wait=True):
        plan = [*keys, *(key for key in _plan(folder) if place(key) not in places)]
        scratch = folder / f".{PLAN}.partial"
        scratch.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        scratch.replace(folder / PLAN)


def _plan(folder: Path) -> list[str]:
    path = folder / PLAN
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def collect(folder: Path) -> list[dict[str, Any]]:
    """The records of all finished cells in the order of the plan, also written to `records.jsonl`."""
    with claimed(folder / LOCKS, "records", wait=True):
        records = [record for key in _plan(folder) for record in read_cell(folder, key)]
        write_json_lines(folder / RECORDS, records)
    return records
