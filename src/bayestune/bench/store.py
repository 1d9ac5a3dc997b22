"""The results folder: finished cells, the plan, locks, and fits that cells share."""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from bayestune.bench.grid import digest, lasting, place, slug
from bayestune.evaluation import RECORDS
from bayestune.jsonl import write_json_lines
from bayestune.methods import Method, WithTraining, changed, described
from bayestune.models import LoadedModel
from bayestune.posteriors import DETAILS, Posterior
from bayestune.scoring import Scorer
from bayestune.session import TaskOptions, fit_method
from bayestune.training import Training

logger = logging.getLogger(__name__)

CELLS, ROWS, PLAN = "cells", "rows", "plan.json"


def cell_file(folder: Path, key: str) -> Path:
    """Where the records of a cell are, once it is finished."""
    return folder / CELLS / f"{key}.jsonl"


def read_cell(folder: Path, key: str) -> list[dict[str, Any]]:
    """The records of a cell; none if it is not finished."""
    path = cell_file(folder, key)
    if not path.is_file():
        return []
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()
    ]


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


LOCKS, FITS = "locks", "fits"


class Busy(Exception):
    """Another process works on this."""


@contextmanager
def claimed(folder: Path, key: str, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock of a key; the operating system frees it when the process ends, however it ends.

    Args:
        folder: of the locks.
        key: what is locked.
        wait: whether to wait for another process that holds it.

    Raises:
        Busy: at once, if another process holds it and `wait` is not set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{key}.lock")
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        raise Busy(key) from None
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class Cached:
    """A method whose fits are kept: a finished one is loaded, another is made, saved and given.

    Its base is kept likewise, so that post-hoc methods of one base, and ensembles, share what they are made of.

    Args:
        method: what is fitted.
        folder: of the results.
        model: the model's name.
        context: a digest of what a fit depends on besides method and training: model, rows, prompts.
        questions: scoring and length of the prompts.
    """

    method: Method
    folder: Path
    model: str
    context: str
    questions: TaskOptions

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Posterior:
        """The posterior of the method under this training; goes on from a checkpoint where there is one.

        Raises:
            Busy: if another process is at this fit.
        """
        if isinstance(self.method, WithTraining):
            inner = replace(self, method=self.method.method)
            return inner.fit(model, scorer, changed(training, self.method.changes))
        settings = described(self.method)
        key = f"{slug(scorer.task.name)}-{settings['method']}-{training.seed}--" + digest(
            self.context, settings, lasting(training)
        )
        with claimed(self.folder / LOCKS, f"fit-{key}"):
            return self._fit(model, scorer, training, self.folder / FITS / key)

    def _fit(self, model: nn.Module, scorer: Scorer, training: Training, output: Path) -> Posterior:
        loaded = LoadedModel(model, scorer.tokenizer, self.model)  # type: ignore[arg-type]
        logger.info(
            "fit %s%s", output.name, ": taken from before" if (output / DETAILS).is_file() else ""
        )
        method = with_base(self.method, self)
        posterior = fit_method(
            method,
            loaded,
            scorer,
            replace(training, output=None, resume=True),
            self.questions,
            output,
        )
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        return posterior


def with_base(method: Method, like: Cached) -> Method:
    """The method with its base, if it has one, kept as `like` is."""
    base: Any = getattr(method, "base", None)
    return method if base is None else replace(method, base=replace(like, method=base))  # type: ignore[type-var]
