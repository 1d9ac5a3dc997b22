"""What a part of a fit takes: seconds, and peak memory."""

import time

from bayestune.runtime import peak_memory_mb, reset_peak_memory


class Meter:
    """Measures from the moment it is made.

    Example:
        >>> sorted(Meter().read())
        ['peak_memory_mb', 'seconds']
    """

    def __init__(self) -> None:
        reset_peak_memory()
        self._begin = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Seconds and peak memory so far, under the names of a `FitReport`."""
        return {"seconds": time.perf_counter() - self._begin, "peak_memory_mb": peak_memory_mb()}
