"""What a fit of several parts needs: a place for what it goes on from, and a whole base model."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bayestune.errors import Refusal
from bayestune.runtime import of_first_process, sharding, wait_for_processes
from bayestune.training import Training


@contextmanager
def workplace(training: Training) -> Iterator[Path]:
    """The training's output; without one a scratch folder, the same one for all processes."""
    with tempfile.TemporaryDirectory() as scratch:
        yield training.output or Path(of_first_process(scratch))
        wait_for_processes()  # for those that still read what is removed now


def refuse_parts_of(name: str) -> None:
    """Refuses a launcher that shards the base over processes, for a method of that name."""
    how = sharding()
    if how is not None and how.of_model:
        raise Refusal(
            f"{name} goes on after a training: got it under {how.name}, which leaves a part of the "
            "base in each process, expected the whole base; start it with DDP (--multi_gpu) or in "
            "one process"
        )
