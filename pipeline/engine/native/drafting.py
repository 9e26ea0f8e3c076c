"""The engine's drafter: guarded, and watched by a thread that names it when it does not return."""

import threading
import time
import warnings
import weakref
from collections.abc import Callable

from drafters.base import Drafter, Target
from drafters.guard import CALL_SECONDS, Guard

WATCH_SECONDS = 30.0
"""A call that has not returned after this long is named, then again after twice as long, and so on."""


class Drafting(Guard):
    """`Guard` with the target attached and a watchdog."""

    def __init__(
        self,
        drafter: Drafter,
        target: Target,
        on_event: Callable[[str], None] | None = None,
        call_seconds: float = CALL_SECONDS,
        watch_seconds: float = WATCH_SECONDS,
    ) -> None:
        super().__init__(drafter, target.decoder.config.vocab_size, on_event or warnings.warn, call_seconds)
        watch = threading.Thread(target=_watch, args=(weakref.ref(self), watch_seconds), daemon=True)
        watch.name = "drafter watchdog"
        watch.start()
        self.attach(target)


def _watch(drafting: "weakref.ref[Drafting]", seconds: float) -> None:
    """An engine cannot end somebody else's call, but it can say whose it is: a stuck run explains itself."""
    call, named = None, seconds
    while True:
        time.sleep(seconds / 4)
        guard = drafting()
        if guard is None:
            return
        since = guard.calling
        if since != call:
            call, named = since, seconds
        elif since is not None and (passed := time.monotonic() - since) > named:
            named *= 2
            guard.on_event(f"drafter {guard.at_work} has not returned for {passed:.0f} s; generation waits for it")
        del guard
