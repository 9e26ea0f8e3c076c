"""From a finished sample to the learner's disk: queue, spool, socket, in a thread of its own.

The main loop waits only when the queue is full, which happens when the spool is; nothing is sent that is not spooled.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.messages import SampleId
from pipeline.transport.base import EngineSocket
from pipeline.transport.spool import Spool

_QUEUE = 256
_WINDOW = 128
"""samples sent and not committed; bounds what the learner has to keep in memory before its disk has it"""
_WRITTEN_AT_ONCE = 32
_RETRY_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class OutboxStats:
    queued: int
    """samples not spooled yet"""
    spooled: int
    """samples spooled and not committed"""
    spooled_bytes: int
    blocked_seconds: float
    """that `put` waited for room"""


class Outbox:
    """Its methods may be called from any thread."""

    def __init__(self, socket: EngineSocket, spool: Spool, on_error: Callable[[str], None]) -> None:
        """
        Args:
            on_error: gets the reason, once, when the spool cannot be written any more.
        """
        self._socket, self._spool, self._on_error = socket, spool, on_error
        self._changed = threading.Condition()
        self._queue: deque[tuple[SampleId, Sequence[bytes]]] = deque()
        self._writing: list[SampleId] = []
        self._unsent: OrderedDict[SampleId, None] = OrderedDict()
        self._uncommitted: set[SampleId] = set()
        self._open = False
        self._forgotten = False
        self._failed = False
        self._stopping = False
        self._blocked_seconds = 0.0
        self._thread = threading.Thread(target=self._write, name="spool", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, sample: SampleId, frames: Sequence[bytes]) -> None:
        """Queue a message for a sample; waits while the queue is full, unless the link is dead: what is queued then is
        spooled at `stop`."""
        began = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: len(self._queue) < _QUEUE or self._failed or self._stopping)
            self._blocked_seconds += time.monotonic() - began
            self._queue.append((sample, frames))
            self._changed.notify_all()

    def connected(self, received: Sequence[SampleId]) -> None:
        """The learner has answered HELLO and has these samples; all others in the spool are sent."""
        with self._changed:
            known = set(received)
            pending = self._spool.pending()
            self._unsent = OrderedDict.fromkeys(sample for sample in pending if sample not in known)
            self._uncommitted = known.intersection(pending)
            self._open = True
            self._changed.notify_all()

    def disconnected(self) -> None:
        """Nothing is sent until the learner answers the next HELLO."""
        with self._changed:
            self._open = False

    def committed(self, samples: Sequence[SampleId]) -> None:
        """These are safe with the learner, or unwanted."""
        with self._changed:
            self._spool.forget(samples)
            self._forgotten = True
            self._uncommitted.difference_update(samples)
            self._changed.notify_all()

    def leases(self) -> set[int]:
        """Leases with samples that are not in the spool yet."""
        with self._changed:
            return {sample[0] for sample in self._writing} | {sample[0] for sample, _ in self._queue}

    def wait_until_empty(self, timeout: float) -> bool:
        """Until everything put so far is committed; False after `timeout` seconds, or when it cannot happen."""
        with self._changed:
            self._changed.wait_for(lambda: self._empty() or self._failed or self._stopping, timeout)
            return self._empty()

    def fail(self) -> None:
        """The link is dead: nobody needs to wait here any more."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Spool what is queued, end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def stats(self) -> OutboxStats:
        with self._changed:
            queued = len(self._queue) + len(self._writing)
            return OutboxStats(queued, len(self._spool.pending()), self._spool.size, self._blocked_seconds)

    def _empty(self) -> bool:
        return not (self._queue or self._writing or self._spool.pending())

    def _write(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._has_work() or self._stopping)
                    stopping = self._stopping
                self._spool_queued(stopping)
                if stopping and not self._queue:
                    return
                self._send_spooled()
        except OSError as error:
            reason = f"the spool {self._spool.folder} cannot be written ({error.strerror or error}); free space there"
            self.fail()
            self._on_error(reason)

    def _has_work(self) -> bool:
        return bool(self._queue and (self._forgotten or not self._spool.full)) or self._may_send()

    def _may_send(self) -> bool:
        return self._open and bool(self._unsent) and len(self._uncommitted) < _WINDOW

    def _spool_queued(self, stopping: bool) -> None:
        self._spool.reclaim()
        with self._changed:
            self._forgotten = False
            if self._spool.full and not stopping:
                return
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), _WRITTEN_AT_ONCE))]
            self._writing = [sample for sample, _ in batch]
            self._changed.notify_all()
        if not batch:
            return
        written = self._spool.append(batch)
        with self._changed:
            self._writing = []
            self._unsent.update(dict.fromkeys(written))
            self._changed.notify_all()

    def _send_spooled(self) -> None:
        while True:
            with self._changed:
                if not self._may_send():
                    return
                sample = next(iter(self._unsent))
                frames = self._spool.read(sample)
                # Under the lock, so that a new connection in between cannot have the sample sent twice.
                if frames is not None and not self._socket.send(frames):
                    self._changed.wait(_RETRY_SECONDS)
                    return
                del self._unsent[sample]
                if frames is not None:
                    self._uncommitted.add(sample)
