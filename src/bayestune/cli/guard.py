"""Runs a command so that the user reads one line of what went wrong, never a traceback."""

import errno
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from bayestune.cli.hub_ids import fetch
from bayestune.cli.parser import COMMANDS, parse
from bayestune.cli.start import EXIT_BAD_INPUT
from bayestune.errors import Refusal
from bayestune.runtime import (
    connect_processes,
    is_first_process,
    keep_freed_memory,
    num_processes,
    sharding,
    show_progress,
)
from bayestune.training import Terminated

EXIT_UNEXPECTED = 70
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
EXPECTED = (ValueError, OSError, ArithmeticError, ImportError)
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad allocation")
_FULL = ("no space left", "disk quota", "file write failed", "failed writing file")
_SPARE_MEMORY = (
    "lower --batch_size (and raise --accumulation), --max_tokens or --max_length, give --bf16, or "
    "choose a smaller --model"
)


# the commands that a launcher may start in several processes
SHARED = ("fit", "compare", "distil", "evaluate", "predict", "rank")
_WHOLE = ("compare", "distil")  # of these, those that need the whole base beside a training
_INSTEAD = {
    "bench": "start it once on each GPU (CUDA_VISIBLE_DEVICES), with the same --output, or give "
    "--launcher ray",
    "generate": "split the rows, and start it once on each GPU (CUDA_VISIBLE_DEVICES)",
    "serve": "start one on each GPU (CUDA_VISIBLE_DEVICES), on ports of their own",
}


def run_guarded(given: Sequence[str]) -> int:
    """Parses and runs a command; returns the exit code that `bayestune.cli.main` documents."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_freed_memory()
    logging.basicConfig(format="bayestune: %(message)s", level=logging.WARNING)
    try:
        with _terminable():
            command, options = parse(given)
            refuse_processes(command)
            if num_processes() > 1:
                connect_processes()  # before a model is put on an accelerator
                _load_whole(command)
            _set_up_output(options)
            fetch(command, options)
            run, _ = COMMANDS[command]
            code = run(options) or 0
            sys.stdout.flush()  # a full disk is noticed here, not after the end
            return code
    except Exception as error:
        return _say(error)
    except KeyboardInterrupt as error:
        said = str(error) or "interrupted"
        print(f"bayestune: {said}", file=sys.stderr)
        return EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED


def refuse_processes(command: str) -> None:
    """Refuses a launcher where each process would do the same work, or has a part of the base."""
    if num_processes() > 1 and command not in SHARED:
        shared = f"{', '.join(SHARED[:-1])} and {SHARED[-1]}"
        instead = _INSTEAD.get(command, "start it without a launcher")
        raise Refusal(
            f"several processes can share {shared} alone: got {num_processes()} for {command!r}, "
            f"expected one; {instead}"
        )
    how = sharding()
    if command in _WHOLE and how is not None and how.of_model:
        raise Refusal(
            f"{command!r} needs the whole base model beside a training: got it under {how.name}, "
            "expected DDP (--multi_gpu) or one process; start it so"
        )


def _load_whole(command: str) -> None:
    """Has each process load the base's weights where no training broadcasts the first one's."""
    if command != "fit":
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def _set_up_output(options: Any) -> None:
    """Bars for a terminal alone; with `--quiet` neither bars nor notes, but warnings.

    Of several processes the first one says what all would say.
    """
    quiet = options.quiet or not is_first_process()
    shown = options.get("progress", True) and not quiet and sys.stderr.isatty()
    show_progress(shown)
    options["progress"] = shown
    level = logging.WARNING if quiet else logging.INFO
    logging.getLogger("bayestune").setLevel(level if is_first_process() else logging.ERROR)


@contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM end the command as ctrl-C does, for the time of the context."""

    def end(*_: Any) -> None:
        raise Terminated

    before: Any = None
    with suppress(ValueError):  # not in the main thread: its owner handles signals
        before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _say(error: Exception) -> int:
    """Says in a line what went wrong; returns the exit code."""
    if isinstance(error, BrokenPipeError):  # such as `| head`: the reader has had enough
        _abandon(sys.stdout)
        return 0
    with_remedy = _remedy(error)
    if with_remedy is None and not isinstance(error, EXPECTED):
        with tempfile.NamedTemporaryFile(
            "w", prefix="bayestune-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write("".join(traceback.format_exception(error)))
        said = f"unexpected {type(error).__name__}: {_one_line(error)}"
        said += f"; a damaged input, or a fault of ours: please report it with {file.name}"
        print(f"bayestune: error: {said}", file=sys.stderr)
        return EXIT_UNEXPECTED
    if isinstance(error, OSError):
        _abandon_if_full()
    print(f"bayestune: error: {with_remedy or _one_line(error)}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _remedy(error: Exception) -> str | None:
    """What to say of a full disk or of memory that ran out, whichever library noticed it."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(part in text for part in _NO_MEMORY):
        return f"memory ran out ({_one_line(error) or type(error).__name__}): {_SPARE_MEMORY}"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or any(part in text for part in _FULL):
        place = getattr(error, "filename", None) or "the output"
        return (
            f"no space left for {place} ({_one_line(error)}): free some, or choose another "
            "--output; what was whole is kept, and a run goes on with --resume"
        )
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _abandon_if_full() -> None:
    """Gives standard output up if it cannot be written, so that Python's end does not try again."""
    try:
        sys.stdout.flush()
    except OSError:
        _abandon(sys.stdout)


def _abandon(stream: Any) -> None:
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
