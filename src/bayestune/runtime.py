"""The process: how it keeps freed memory, its peak memory, the versions and the revision that run."""

import ctypes
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # glibc's malloc.h
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**26}
_STOCK = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 2**17, _TOP_PAD: 0}


def keep_freed_memory(keep: bool = True) -> bool:
    """Lets glibc keep large blocks that were freed, for the next tensor, instead of giving each back to the system.

    By default every tensor of more than some MiB is new memory, whose pages the system clears and maps one by one
    when it is first written; on the CPU that takes a third of a pass over many rows (benchmarks/allocator.py). The
    price: the process keeps the most memory it has used until it ends. The commands do this; in your own script call
    it once at the start.

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
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):
        return False
    took = [mallopt(name, value) == 1 for name, value in (_KEPT if keep else _STOCK).items()]
    if not keep:
        trim(0)
    return all(took)


def peak_memory_mb() -> float:
    """Peak memory of the process so far in MB: the accelerator's where there is one, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries a figure depends on."""
    names = ("bayestune", "torch", "transformers", "peft", "accelerate")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def git_revision() -> str | None:
    """The revision of the source checkout that is running, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
