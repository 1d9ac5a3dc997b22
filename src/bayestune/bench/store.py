"""The results folder of a grid: finished cells, the plan, locks, and fits that cells share."""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout
from torch import nn

from bayestune.bench.keys import digest, lasting, lasting_method, readable_part, slug
from bayestune.evaluation import RECORDS, Record
from bayestune.methods import Method, WithTraining, changed
from bayestune.posteriors import DETAILS, Posterior, posterior_digest
from bayestune.scoring import Scorer
from bayestune.session import Fit, Session
from bayestune.training import Training
from bayestune.whole_files import read_json_lines, write_json_lines, write_text_whole

logger = logging.getLogger(__name__)

CELLS = "cells"
ROWS = "rows"
FITS = "fits"
LOCKS = "locks"
PLAN = "plan.json"


def cell_file(folder: Path, key: str) -> Path:
    """Where the records of a finished cell are."""
    return folder / CELLS / f"{key}.jsonl"


def read_cell(folder: Path, key: str) -> list[Record]:
    """The records of a cell; none if it is not finished."""
    return read_json_lines(cell_file(folder, key), missing_ok=True)


def write_plan(folder: Path, keys: Sequence[str]) -> None:
    """Writes the order of the cells; cells of earlier plans come after those of this one.

    An earlier cell is dropped if this plan has one of the same model, task, method and seed.
    """
    planned = {readable_part(key) for key in keys}
    with claimed(folder / LOCKS, "plan", wait=True):
        earlier = [key for key in _read_plan(folder) if readable_part(key) not in planned]
        write_text_whole(folder / PLAN, json.dumps([*keys, *earlier], indent=1) + "\n")


def _read_plan(folder: Path) -> list[str]:
    path = folder / PLAN
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def finished(folder: Path) -> list[Record]:
    """The records of all finished cells of a results folder, in the order of its plan."""
    return [record for key in _read_plan(folder) for record in read_cell(folder, key)]


def collect(folder: Path) -> list[Record]:
    """Writes the records of all finished cells to `records.jsonl`, in order, and returns them."""
    with claimed(folder / LOCKS, "records", wait=True):
        records = finished(folder)
        write_json_lines(folder / RECORDS, records)
    return records


class Busy(Exception):
    """Another process holds the lock of what was to be computed."""


@contextmanager
def claimed(folder: Path, key: str, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock of a key, which the operating system frees however the process ends.

    Args:
        folder: of the locks.
        key: what is locked.
        wait: whether to wait while another process holds the lock.

    Raises:
        Busy: at once, if another process holds it and `wait` is false.
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
class Kept:
    """A method whose fits, and those of its base, are kept in the results folder and shared.

    It stands in for the method: its `fit` returns the kept posterior, or fits and keeps it.
    """

    method: Method
    session: Session
    folder: Path
    context: str  # a digest of what any fit on this model and task depends on

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Posterior:
        """The posterior of `fitted`; model and scorer are those of the session."""
        return self.fitted(training).posterior

    def fitted(self, training: Training) -> Fit:
        """The fit under this training, kept from before, resumed from a checkpoint, or new.

        Raises:
            Busy: if another process works on it.
        """
        if isinstance(self.method, WithTraining):
            inner = replace(self, method=self.method.method)
            return inner.fitted(changed(training, self.method.changes))
        settings = lasting_method(self.method)
        of_all = digest(self.context, settings, lasting(training))
        name = f"{slug(self.session.task.name)}-{settings['method']}-{training.seed}--{of_all}"
        output = self.folder / FITS / name
        base = getattr(self.method, "base", None)
        kept_base = replace(self, method=base) if base else None
        with claimed(self.folder / LOCKS, f"fit-{name}"):
            note = ", known from before" if (output / DETAILS).is_file() else ""
            logger.info("fit %s%s", name, note)
            training = replace(training, output=None, resume=True)
            fit = self.session.fit(self.method, training, output, base=kept_base)
            shutil.rmtree(output / "checkpoints", ignore_errors=True)
            fit.posterior.digest = posterior_digest(output)
        return fit
