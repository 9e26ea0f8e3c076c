"""Ctrl-C, SIGTERM and a terminal's end: the first asks for one clean stop, the second stops now."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

INTERRUPTED = 130


class StopSignal:
    """Set once a stop was asked for. Create it in the main thread."""

    def __init__(self, before_exit: Callable[[], None] = lambda: None) -> None:
        self._event = threading.Event()
        self.before_exit = before_exit
        """called by the second signal, in the signal handler, right before the process ends"""
        self.signal: int | None = None
        # What nohup made ignored stays so. By the others a run ends its own processes, whatever a shell made of them.
        hangs_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
        for number in (signal.SIGINT, signal.SIGTERM, *hangs_up):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            sys.stderr.write("stopped at once\n")
            sys.stderr.flush()
            self.before_exit()
            os._exit(INTERRUPTED)
        self.signal = number
        self._event.set()

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    @property
    def left_in_order(self) -> bool:
        """Whether it was SIGTERM, by which an engine is asked to leave; a run or a learner is interrupted by it."""
        return self.signal == signal.SIGTERM
