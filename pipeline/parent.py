"""Processes that do not outlive the one that started them."""

import ctypes
import os
import signal
import sys

_PDEATHSIG = 1


def end_with_parent(parent: int | None = None) -> None:
    """Linux kills this process when the thread that started it ends, however that ends, and whatever hangs here.

    Args:
        parent: process that started this one; where it is gone already, this ends at once. None: it is not known.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
