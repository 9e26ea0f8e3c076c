"""Places in the code where a test or a fault harness makes the process fail. Torch-free.

    ROLLAHEAD_FAILPOINTS="journal.fsync=kill@3;spool.append=enospc*5;checkpoint.renamed=kill%0.2"

`kill` ends the process as kill -9 does, `error` raises OSError (EIO), `enospc` OSError (disk full), `sleep:S` waits.
`@N` lets the first N-1 passes go, `*N` acts N times (`kill` needs no count), `%P` acts with probability P. Without the
variable a failpoint costs a function call.
"""

import errno
import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field

from pipeline.errors import UsageError

VARIABLE = "ROLLAHEAD_FAILPOINTS"
NAMES = (
    "lease.granted", "lease.recorded", "lease.sent",
    "spool.write", "spool.torn", "spool.fsync", "spool.synced", "sample.sent",
    "sample.received", "journal.write", "journal.torn", "journal.fsync", "journal.synced", "ack.sent",
    "ack.handled",
    "step.trained", "publish.written", "publish.renamed", "publish.announced", "step.counted", "records.write",
    "step.recorded", "batches.write", "tensors.write",
    "weights.sent", "weights.received",
    "checkpoint.begun", "checkpoint.written", "checkpoint.renamed", "checkpoint.done",
)  # fmt: skip
"""In the order of a sample's life. `torn` lies in the middle of a write; `tensors` are those of publications,
checkpoints, draft heads and small models; `weights` pieces of a publication that is broadcast."""


_random = random.SystemRandom()  # forked processes must not fail in step


@dataclass(slots=True)
class _Failpoint:
    action: str
    first: int = 1
    times: int = 0
    probability: float = 1.0
    passes: int = 0
    acted: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self) -> None:
        with self.lock:
            self.passes += 1
            due = self.passes >= self.first and (not self.times or self.acted < self.times)
            due = due and (self.probability >= 1 or _random.random() < self.probability)
            self.acted += due
        if due:
            _act(self.action)


def _act(action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action in ("error", "enospc"):
        number = errno.ENOSPC if action == "enospc" else errno.EIO
        raise OSError(number, os.strerror(number))
    else:
        time.sleep(float(action.removeprefix("sleep:")))


def parse(text: str) -> dict[str, _Failpoint]:
    """The failpoints that a variable's value asks for.

    Raises:
        UsageError: a name or an action that there is not.
    """
    found = {}
    for part in filter(None, text.split(";")):
        name, _, rest = part.partition("=")
        try:
            found[name.strip()] = _parse_action(rest.strip())
            if name.strip() not in NAMES:
                raise ValueError
        except ValueError:
            raise UsageError(
                f"{VARIABLE}: {part!r} is no failpoint; write NAME=kill|error|enospc|sleep:S with @N, *N or %P behind "
                f"it; names: {', '.join(NAMES)}"
            ) from None
    return found


def _parse_action(text: str) -> _Failpoint:
    text, _, probability = text.partition("%")
    text, _, times = text.partition("*")
    action, _, first = text.partition("@")
    if action.startswith("sleep:"):
        float(action.removeprefix("sleep:"))
    elif action not in ("kill", "error", "enospc"):
        raise ValueError(action)
    return _Failpoint(action, int(first or 1), int(times or 0), float(probability or 1.0))


def failpoint(name: str) -> None:
    """Marks a place; what happens there is chosen when the process starts, and is nothing as a rule."""
    if _active and (point := _active.get(name)) is not None:
        point()


def armed(name: str) -> bool:
    """Whether the failpoint may do something; for places that have to be prepared."""
    return name in _active


def arm(text: str) -> None:
    """Set failpoints in a process that runs already, in the variable's syntax."""
    _active.clear()
    _active.update(parse(text))


_active: dict[str, _Failpoint] = {}
arm(os.environ.get(VARIABLE, ""))
