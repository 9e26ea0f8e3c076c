"""What a learner says while nothing comes: that no engine is there, and where everything was when it gave up."""

import threading
from collections.abc import Callable
from pathlib import Path

from learner.hub import Hub
from pipeline.watchdog import stacks

_FIRST_SECONDS = 30.0
_MOST_SECONDS = 600.0


class Loneliness:
    """Says now and then, ever more rarely, that no engine is connected."""

    def __init__(self, say: Callable[[str], None], hub: Hub, now: float) -> None:
        self._say, self._hub = say, hub
        self._since, self._next = now, _FIRST_SECONDS

    def look(self, engines: int, now: float) -> None:
        """To be called several times a second.

        Args:
            now: in seconds, of any clock.
        """
        if engines:
            self._since, self._next = now, _FIRST_SECONDS
        elif (alone := now - self._since) >= self._next:
            self._next = alone + min(alone, _MOST_SECONDS)
            self._say(
                f"no engine for {alone:.0f} s; start one with the same configuration and "
                f"--connect {self._hub.address}, or see its log"
            )


def dump_state(path: Path, state: str) -> str:
    """Write a state and the stacks of all threads; returns words that name the file, or why there is none."""
    try:
        path.write_text(f"{state}\n\n{stacks(threading.get_ident())}")
    except OSError as error:
        return f"{path} cannot be written ({error.strerror or error})"
    return f"{path} says who holds what"
