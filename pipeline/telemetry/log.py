"""Plain lines on stderr: time, process, text. Processes whose terminal is somebody else's write nothing fancier."""

import sys
import time


class Log:
    """`Log("engine")("text")` prints one line; safe from any thread because it is one write."""

    def __init__(self, process: str) -> None:
        self.process = process

    def __call__(self, text: str) -> None:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {self.process}: {text}\n")
        sys.stderr.flush()


class LineLimit:
    """At most so many lines a minute, for lines that a stranger could cause at will."""

    def __init__(self, a_minute: int) -> None:
        self._a_minute = a_minute
        self._minute, self._count = -1, 0

    def allow(self, now: float) -> bool:
        """Whether a line may be written now.

        Args:
            now: seconds of any clock.
        """
        if int(now / 60) != self._minute:
            self._minute, self._count = int(now / 60), 0
        self._count += 1
        return self._count <= self._a_minute
