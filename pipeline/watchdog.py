"""Notices that the main loop of a process does not go round any more, and says where it hangs. Torch-free.

Heartbeats of a socket say that a process lives; they go on when its main thread hangs in a lock or on a device. So the
main loop says itself that it goes on, and a thread looks whether it has.
"""

import sys
import threading
import time
import traceback
from collections.abc import Callable


class Watchdog:
    """`beat()` from the main loop; made in the thread it watches."""

    def __init__(self, seconds: float, on_stall: Callable[[str, str], None]) -> None:
        """
        Args:
            seconds: without a beat until it is a stall; 0: never.
            on_stall: gets a sentence, and the stacks of all threads; called once, in the watchdog's thread.
        """
        self._seconds, self._on_stall = seconds, on_stall
        self._main = threading.get_ident()
        self._beat = time.monotonic()
        self._ended = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """The main loop goes on."""
        self._beat = time.monotonic()

    def close(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(self._seconds / 4, 5.0)):
            silent = time.monotonic() - self._beat
            if silent > self._seconds:
                self._on_stall(
                    f"the main loop has made no progress for {silent:.0f} s (transport.stall_seconds)",
                    stacks(self._main),
                )
                return


def stacks(first: int) -> str:
    """Where every thread is, the one with the identity `first` last, as that is what remains of a text cut short."""
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    order = sorted(frames, key=lambda identity: identity == first)
    return "\n".join(
        f"thread {names.get(identity, identity)}:\n{''.join(traceback.format_stack(frames[identity]))}"
        for identity in order
    )
