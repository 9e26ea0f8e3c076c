"""Where a process's time goes: seconds by state, and a trace that Chrome and Perfetto open.

A trace file is the Trace Event Format's array form, whose closing bracket may be missing, so that a killed process
leaves a file that opens. Times are of the system's clock: processes of one machine line up.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from pipeline.telemetry.log import Log

SHORTEST_SPAN = 0.02
"""seconds; what is shorter is counted, and in the trace belongs to the span around it"""
BYTES_A_TRACE = 32 << 20


class StateClock:
    """Of one thread: it is in one state at any moment."""

    def __init__(self, state: str, trace: "Trace | None" = None, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        """by state, since the beginning; up to the last change of state"""
        self._now = now
        self._state, self._since = state, now()
        self._span, self._span_since = state, self._since
        self._trace = trace

    def enter(self, state: str) -> None:
        """From now on the thread is in this state."""
        if state != self._state:
            self._leave(self._now())
            self._state = state

    def close(self) -> None:
        """The last span ends now."""
        now = self._now()
        self._leave(now)
        if self._trace is not None:
            self._trace.span(self._span, self._span_since, now)
        self._span_since = now

    def _leave(self, now: float) -> None:
        state, lasted = self._state, now - self._since
        self.seconds[state] = self.seconds.get(state, 0.0) + lasted
        if self._trace is not None and state != self._span and lasted >= SHORTEST_SPAN:
            self._trace.span(self._span, self._span_since, self._since)
            self._span, self._span_since = state, self._since
        self._since = now


class Trace:
    """One process's file; a file of a process that has gone is never written again."""

    def __init__(self, folder: Path, process: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = (folder / f"{process}-{os.getpid()}-{time.time_ns() // 1_000_000}.json").open("w")
        self._offset = time.time() - time.perf_counter()
        self._left = BYTES_A_TRACE
        self._write({"name": "process_name", "ph": "M", "args": {"name": process}}, first=True)

    def span(self, name: str, begin: float, end: float, **arguments: Any) -> None:
        """A stretch of time.

        Args:
            begin, end: of `time.perf_counter`, seconds.
        """
        microseconds = {"ts": (begin + self._offset) * 1e6, "dur": (end - begin) * 1e6}
        self._write({"name": name, "ph": "X", **microseconds, "args": arguments})

    def counter(self, name: str, **values: float) -> None:
        """Values that are drawn as an area over time."""
        self._write({"name": name, "ph": "C", "ts": time.time() * 1e6, "args": values})

    def close(self) -> None:
        self._append("\n]\n")
        with contextlib.suppress(OSError):  # of what could not be written before
            self._file.close()

    def _write(self, event: dict[str, Any], first: bool = False) -> None:
        text = ("[\n" if first else ",\n") + json.dumps(event | {"pid": os.getpid(), "tid": 0})
        if len(text) > self._left or self._file.closed:
            return
        self._left -= len(text)
        self._append(text)

    def _append(self, text: str) -> None:
        """A trace is not worth a run: what cannot be written ends it, with a line."""
        if self._file.closed:
            return
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            Log("trace")(f"warning: {self._file.name} cannot be written and ends here: {error.strerror or error}")
            with contextlib.suppress(OSError):
                self._file.close()


def merge(files: Iterable[Path]) -> list[dict[str, Any]]:
    """The events of several processes' traces in one list; a line that a crash cut short is left out.

    Two processes can have the same process id when they lived on two machines, or one after the other: each file gets
    a number of its own.
    """
    events = []
    for number, path in enumerate(sorted(files), 1):
        for line in path.read_text().splitlines():
            text = line.rstrip(",")
            if not text.startswith("{"):
                continue
            try:
                events.append(json.loads(text) | {"pid": number})
            except json.JSONDecodeError:
                continue
    return events
