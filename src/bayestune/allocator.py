"""How the C library handles large blocks of memory: on the CPU it decides how fast a pass is."""

import ctypes
import sys

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
