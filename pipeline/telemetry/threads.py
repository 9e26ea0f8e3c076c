"""CPU time of single threads of this process, those of libraries included."""

import contextlib
import threading
import time
from collections.abc import Collection
from pathlib import Path

_TASKS = Path("/proc/self/task")


def cpu_seconds(names: Collection[str], library: str) -> float | None:
    """What some threads that live now have computed since they began, in seconds; None where Linux is not there to ask.

    Args:
        names: of Python's threads.
        library: what the kernel's names of other threads begin with.
    """
    if not _TASKS.is_dir():
        return None
    ours = {thread.native_id: thread.name for thread in threading.enumerate()}
    total = 0.0
    for task in _TASKS.iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            number = int(task.name)
            wanted = ours[number] in names if number in ours else (task / "comm").read_text().startswith(library)
            if wanted:
                # The clock of a thread as the kernel numbers it; what pthread_getcpuclockid computes for Python's own.
                total += time.clock_gettime((~number << 3) | 6)
    return total
