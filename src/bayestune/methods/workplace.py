"""Where a fit of several parts keeps what it goes on from, in one process or in several."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bayestune.runtime import of_first_process, wait_for_processes
from bayestune.training import Training


@contextmanager
def workplace(training: Training) -> Iterator[Path]:
    """The training's output, or a scratch folder, the first process's for all of them."""
    with tempfile.TemporaryDirectory() as scratch:
        yield training.output or Path(of_first_process(scratch))
        wait_for_processes()  # for those that still read what is removed now
