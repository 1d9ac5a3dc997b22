"""The process: its memory, the versions and the revision that run, and others of the same run."""

import ctypes
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

import bayestune

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

S = TypeVar("S")
T = TypeVar("T")

# M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD of glibc's malloc.h
_KEPT = {-4: 0, -1: 2**31 - 1, -2: 2**26}
_STOCK = {-4: 65536, -1: 2**17, -2: 0}

_PROCESS = Path("/proc/self")


def keep_freed_memory(keep: bool = True) -> bool:
    """Lets glibc keep large blocks that were freed for the next tensor, instead of returning them.

    By default every tensor of more than some MiB is new memory, whose pages the system clears and
    maps one by one when it is first written; on the CPU that takes a third of a pass over many rows
    (studies/choices.py). The price: the process keeps the most memory it has used until it ends.
    The commands do this; in your own script call it once at the start.

    Args:
        keep: False for the C library's own defaults; what was kept is given back.

    Returns:
        Whether it took effect: with glibc on Linux, unless another allocator stands in for its own.

    Reference:
        The GNU C Library, `mallopt`: https://man7.org/linux/man-pages/man3/mallopt.3.html.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL(None)
        mallopt = library.mallopt
        trim = library.malloc_trim
    except (OSError, AttributeError):
        return False
    settings = _KEPT if keep else _STOCK
    took = [mallopt(name, value) == 1 for name, value in settings.items()]
    if not keep:
        trim(0)
    return all(took)


def show_progress(shown: bool) -> None:
    """Shows or silences the progress bars of the libraries that load models and data."""
    quiet = "0" if shown else "1"
    # datasets is imported late and reads it then
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = quiet
    if shown:
        transformers_logging.enable_progress_bar()
        enable_progress_bars()
    else:
        transformers_logging.disable_progress_bar()
        disable_progress_bars()
        if "datasets" in sys.modules:  # it has read its variable already
            sys.modules["datasets"].disable_progress_bars()


def follow_umask(folder: Path, names: Collection[str] | None = None) -> None:
    """Gives files the mode of any new file: safetensors makes them their owner's alone.

    Args:
        folder: that holds them.
        names: which of its files; None for all.
    """
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.iterdir():
        own = names is None or path.name in names
        if own and path.is_file() and not path.is_symlink():
            path.chmod(mode)


def reset_peak_memory() -> None:
    """Begins a new measurement for `peak_memory_mb`, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")  # see proc_pid_clear_refs(5)
    except OSError:
        return  # another system than Linux, or not allowed: the peak is that of the process so far


def peak_memory_mb() -> float:
    """Peak memory in MB since the last reset: the accelerator's, else resident; NaN if unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        status = (_PROCESS / "status").read_text(encoding="ascii", errors="replace")
    except OSError:
        if resource is None:
            return float("nan")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, else KiB
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) / 2**10


def versions() -> dict[str, str]:
    """Versions of Python, of this package, and of the libraries a figure depends on."""
    own = {"python": platform.python_version(), "bayestune": bayestune.__version__}
    return own | {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}


def revision() -> str | None:
    """The revision of bayestune's own checkout, with "-dirty" after changes; None if installed."""
    root = Path(__file__).parents[2]
    try:
        # a package in a virtual environment inside somebody's repository does not belong to it
        top = _git(root, "rev-parse", "--show-toplevel")
        ours = Path(top) == root.resolve() and _git(root, "ls-files", "src/bayestune/runtime.py")
        return _git(root, "describe", "--always", "--dirty", "--exclude=*") if ours else None
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *command: str) -> str:
    call = ["git", "-C", str(folder), *command]
    return subprocess.check_output(call, text=True, stderr=subprocess.DEVNULL).strip()


def num_processes() -> int:
    """How many processes run the same command."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first_process() -> bool:
    """Whether this one writes files and prints."""
    return process_index() == 0


def wait_for_processes() -> None:
    """Waits until all processes are here."""
    if num_processes() > 1:
        connect_processes().wait_for_everyone()


def of_all_processes(value: T) -> list[T]:
    """What each of the processes gives, in their order, in all of them; called by all."""
    if num_processes() == 1:
        return [value]
    connect_processes()
    found: list[Any] = [None] * num_processes()
    torch.distributed.all_gather_object(found, value)
    return found


def of_first_process(value: T) -> T:
    """What the first process gives, in all of them; called by all."""
    return of_all_processes(value)[0]


def in_first_process(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, or its ValueError or OSError; all wait for it."""
    given: tuple[T | None, Exception | None] = (None, None)
    if is_first_process():
        try:
            given = work(), None
        except (ValueError, OSError) as error:
            given = None, error
    value, refused = of_first_process(given)
    if refused is not None:
        raise refused
    return cast(T, value)


def shared_work(items: Sequence[S], work: Callable[[S], T]) -> list[T]:
    """`work(item)` of each item in order: processes divide the items, and all get all results."""
    own = [work(item) for item in items[process_index() :: num_processes()]]
    parts = of_all_processes(own)
    return [parts[index % len(parts)][index // len(parts)] for index in range(len(items))]


class Sharding(NamedTuple):
    """What a launcher shards a training with, and whether the model itself is in parts."""

    name: str
    of_model: bool


def sharding() -> Sharding | None:
    """What accelerate's launcher says; None where each process has a whole model, as under DDP."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return Sharding(f"FSDP {os.environ.get('FSDP_VERSION', '1')}", True)
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        stage = _zero_stage()
        return Sharding(f"ZeRO-{stage}", stage == 3)
    return None


def _zero_stage() -> int:
    """The stage in DeepSpeed's own file where there is one, else in accelerate's options."""
    path = Path(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"))
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        return int(config.get("zero_optimization", {}).get("stage", 0))
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def connect_processes() -> PartialState:
    """Connects the processes, if they are not, and gives each an accelerator of its own."""
    return PartialState(cpu=not torch.accelerator.is_available())
