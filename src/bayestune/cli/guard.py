"""Runs a command; one that fails says why in one line, never with a traceback, and by its code."""

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

from jsonargparse import Namespace

from bayestune.cli.hub_ids import fetch_hub_ids
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
EXPECTED = (ValueError, OSError, ArithmeticError, ImportError)  # of bad input; others are bugs
# parts of messages by which libraries say it, in lower case
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad allocation")
_DISK_FULL = ("no space left", "disk quota", "file write failed", "failed writing file")
_SPARE_MEMORY = (
    "lower --batch_size (and raise --accumulation), --max_tokens or --max_length, give --bf16, or "
    "choose a smaller --model"
)
# the commands that a launcher may start in several processes
SHARED = ("fit", "compare", "distil", "evaluate", "predict", "rank")
_NEEDS_WHOLE_BASE = ("compare", "distil")  # of these, those that use it outside of a training
_INSTEAD = {  # of a launcher, for commands that have a way of their own to use several GPUs
    "bench": "start it once on each GPU (CUDA_VISIBLE_DEVICES), with the same --output, or give "
    "--launcher ray",
    "generate": "split the rows, and start it once on each GPU (CUDA_VISIBLE_DEVICES)",
    "serve": "start one on each GPU (CUDA_VISIBLE_DEVICES), on ports of their own",
}


def run_guarded(arguments: Sequence[str]) -> int:
    """Parses and runs a command.

    Args:
        arguments: what was typed after `bayestune`.

    Returns:
        The exit code that `bayestune.cli.main` documents.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_freed_memory()
    logging.basicConfig(format="bayestune: %(message)s", level=logging.WARNING)
    try:
        with _sigterm_as_interrupt():
            command, args = parse(arguments)
            refuse_processes(command)
            if num_processes() > 1:
                connect_processes()  # before a model is put on an accelerator
                _load_weights_everywhere(command)
            _set_up_output(args)
            fetch_hub_ids(command, args)
            run, _ = COMMANDS[command]
            code = run(args) or 0
            sys.stdout.flush()  # a full disk is noticed here, not after the end
            return code
    except Exception as error:
        return _report_error(error)
    except KeyboardInterrupt as error:
        message = str(error) or "interrupted"
        print(f"bayestune: {message}", file=sys.stderr)
        return EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED


def refuse_processes(command: str) -> None:
    """Refuses a launcher that a command cannot work under.

    Raises:
        Refusal: if each process would do the same work, or the command needs the whole base and
            each process has a part of it.
    """
    if num_processes() > 1 and command not in SHARED:
        shared = f"{', '.join(SHARED[:-1])} and {SHARED[-1]}"
        instead = _INSTEAD.get(command, "start it without a launcher")
        raise Refusal(
            f"several processes can share {shared} alone: got {num_processes()} for {command!r}, "
            f"expected one; {instead}"
        )
    kind = sharding()
    if command in _NEEDS_WHOLE_BASE and kind is not None and kind.of_model:
        raise Refusal(
            f"{command!r} needs the whole base model beside a training: got it under {kind.name}, "
            "expected DDP (--multi_gpu) or one process; start it so"
        )


def _load_weights_everywhere(command: str) -> None:
    """Has each process load the base's weights.

    Under FSDP the first one alone may load them. The training of `fit` gives them to the others;
    other commands do not.
    """
    if command != "fit":
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def _set_up_output(args: Namespace) -> None:
    """Shows progress bars in a terminal alone; with `--quiet` neither bars nor notes, but warnings.

    Of several processes the first one says what all would say.
    """
    quiet = args.quiet or not is_first_process()
    shows_bars = args.get("progress", True) and not quiet and sys.stderr.isatty()
    show_progress(shows_bars)
    args["progress"] = shows_bars
    level = logging.WARNING if quiet else logging.INFO
    logging.getLogger("bayestune").setLevel(level if is_first_process() else logging.ERROR)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Makes SIGTERM end the command as ctrl-C does, for the time of the context."""

    def terminate(*_: Any) -> None:
        raise Terminated

    handler_before: Any = None
    with suppress(ValueError):  # outside of the main thread, whose owner handles signals
        handler_before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if handler_before is not None:
            signal.signal(signal.SIGTERM, handler_before)


def _report_error(error: Exception) -> int:
    """Says in one line what went wrong; returns the exit code."""
    if isinstance(error, BrokenPipeError):  # such as `| head`: the reader has had enough
        _abandon(sys.stdout)
        return 0
    of_resources = _out_of_resources(error)
    if of_resources is None and not isinstance(error, EXPECTED):
        with tempfile.NamedTemporaryFile(
            "w", prefix="bayestune-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write("".join(traceback.format_exception(error)))
        message = f"unexpected {type(error).__name__}: {_one_line(error)}"
        message += f"; a damaged input, or a fault of ours: please report it with {file.name}"
        print(f"bayestune: error: {message}", file=sys.stderr)
        return EXIT_UNEXPECTED
    if isinstance(error, OSError):
        _abandon_stdout_if_full()
    print(f"bayestune: error: {of_resources or _one_line(error)}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _out_of_resources(error: Exception) -> str | None:
    """What to say if the memory ran out or the disk is full, whichever library noticed it."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(part in text for part in _NO_MEMORY):
        return f"memory ran out ({_one_line(error) or type(error).__name__}): {_SPARE_MEMORY}"
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if is_full or any(part in text for part in _DISK_FULL):
        place = getattr(error, "filename", None) or "the output"
        return (
            f"no space left for {place} ({_one_line(error)}): free some, or choose another "
            "--output; what was whole is kept, and a run goes on with --resume"
        )
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _abandon_stdout_if_full() -> None:
    """Gives standard output up if it cannot be written, so that Python does not try at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        _abandon(sys.stdout)


def _abandon(stream: Any) -> None:
    """Sends what a stream still holds to the null device."""
    with suppress(OSError, ValueError):
        null_device = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null_device, stream.fileno())
        os.close(null_device)
