"""The process: the memory it keeps, its peak memory, the versions and the revision that run."""

import contextlib
import ctypes
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

# of glibc's malloc.h
_TRIM_THRESHOLD = -1
_TOP_PAD = -2
_MMAP_MAX = -4
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**26}
_STOCK = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 2**17, _TOP_PAD: 0}

_PROCESS = Path("/proc/self")


def keep_freed_memory(keep: bool = True) -> bool:
    """Lets glibc keep large blocks that were freed for the next tensor, instead of returning them.

    By default the system clears and maps the pages of every large tensor anew; on the CPU that
    takes a third of a pass over many rows (studies/choices.py). The price: the process keeps the
    most memory it has used. The commands do this; in your own script call it once at the start.

    Args:
        keep: False for the C library's own defaults; what was kept is given back.

    Returns:
        Whether it took: true with glibc on Linux, where nothing else stands in for its allocator.

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
    took = [mallopt(name, value) == 1 for name, value in (_KEPT if keep else _STOCK).items()]
    if not keep:
        trim(0)
    return all(took)


def reset_peak_memory() -> None:
    """Begins a new measurement for `peak_memory_mb`, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is the process's
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")  # see proc_pid_clear_refs(5)


def peak_memory_mb() -> float:
    """Peak memory in MB since the last reset: the accelerator's, else resident, NaN if unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        status = (_PROCESS / "status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return _peak_of_the_process_mb()
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) / 2**10


def _peak_of_the_process_mb() -> float:
    if resource is None:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, else KiB


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries a figure depends on."""
    names = ("bayestune", "torch", "transformers", "peft", "accelerate")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def revision() -> str | None:
    """The revision of bayestune's own checkout, with "-dirty" after changes; None if installed.

    A package in a virtual environment inside somebody's repository is not of that repository.
    """
    root = Path(__file__).parents[2]
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        ours = Path(top) == root.resolve() and _git(root, "ls-files", "src/bayestune/runtime.py")
        return _git(root, "describe", "--always", "--dirty", "--exclude=*") if ours else None
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *command: str) -> str:
    command = ("git", "-C", str(folder), *command)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
