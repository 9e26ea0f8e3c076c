"""A watchdog for drafters: an engine cannot end somebody else's call, but it can say whose it is."""

import threading
import time
import weakref
from collections.abc import Callable

from drafters.guard import Guard

WATCH_SECONDS = 30.0
"""A call that has not returned after this long is named, then again after twice as long, and so on."""


def watch(guard: Guard, seconds: float = WATCH_SECONDS, say: Callable[[str], None] | None = None) -> None:
    """Starts a thread that names a drafter which does not return; it ends with the guard.

    Args:
        guard: around the drafter.
        seconds: after which it is named for the first time.
        say: told in one sentence; None: the guard's `on_event`.
    """
    thread = threading.Thread(target=_watch, args=(weakref.ref(guard), seconds, say), daemon=True)
    thread.name = "drafter watchdog"
    thread.start()


def _watch(watched: "weakref.ref[Guard]", seconds: float, say: Callable[[str], None] | None) -> None:
    call, named = None, seconds
    while True:
        time.sleep(seconds / 4)
        guard = watched()
        if guard is None:
            return
        since = guard.calling
        if since != call:
            call, named = since, seconds
        elif since is not None and (passed := time.monotonic() - since) > named:
            named *= 2
            sentence = f"drafter {guard.at_work} has not returned for {passed:.0f} s; generation waits for it"
            (say or guard.on_event)(sentence)
        del guard
