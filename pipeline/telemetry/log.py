"""Lines on stderr: time, process, text; or JSON objects, for collectors. Processes whose terminal is somebody else's
write nothing fancier."""

import json
import sys
import time
from collections import deque
from typing import Any, ClassVar

_CONTROL = dict.fromkeys([*range(32), *range(127, 160)], "?")
del _CONTROL[ord("\n")], _CONTROL[ord("\t")]
"""signs that a terminal obeys; a peer's error message may hold any"""


class Log:
    """`Log("engine")("text")` prints one line; safe from any thread because it is one write."""

    structured = False
    """of the whole process: JSON objects with time, level, process, what `about` holds, and text"""
    about: ClassVar[dict[str, Any]] = {}
    """run and policy version, as far as they are known"""
    recent: ClassVar[deque[str]] = deque(maxlen=2)
    """what was said last, for a live view; lines above it scroll away"""

    def __init__(self, process: str) -> None:
        self.process = process

    def __call__(self, text: str) -> None:
        Log.recent.append(text.translate(_CONTROL).partition("\n")[0])
        sys.stderr.write(self._line(text) + "\n")
        sys.stderr.flush()

    def _line(self, text: str) -> str:
        text = text.translate(_CONTROL)
        if not Log.structured:
            return f"{time.strftime('%H:%M:%S')} {self.process}: {text}"
        level = "warning" if text.lower().startswith("warning") else "info"
        return json.dumps({"time": time.time(), "level": level, "process": self.process, **Log.about, "text": text})


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
