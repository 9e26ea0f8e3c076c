"""Memory that a run takes beyond what its process held before it."""

import ctypes
import gc
from pathlib import Path

from benchmarks.results import resident_bytes

_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""`man 5 proc`: sets the peak of resident memory to what is resident now"""


class Growth:
    """From construction on; what earlier runs freed is given back to the system first, so that it counts again."""

    def __init__(self) -> None:
        gc.collect()
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        self._before: int | None = None
        try:
            _CLEAR.write_text(_RESET_PEAK)
            self._before = resident_bytes()
        except OSError:
            pass  # then it is not known, and `most` says so

    def most(self) -> int | None:
        """Bytes at the peak; None where the system does not say."""
        return None if self._before is None else max(0, resident_bytes(peak=True) - self._before)
