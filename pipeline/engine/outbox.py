"""From a finished sample to the learner's disk: queue, spool, socket, in a thread of its own.

Nothing is sent that is not spooled, and nobody waits here: what bounds the queue is that the engine takes no new leases
while there is no room (`has_room`), so at most the sequences under way come on top. A disk that is full is waited for.
"""

import errno
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.errors import UsageError
from pipeline.failpoints import failpoint
from pipeline.messages import SampleId
from pipeline.transport.base import EngineSocket
from pipeline.transport.spool import Spool

_QUEUE = 256
_WINDOW_SAMPLES, _WINDOW_BYTES = 128, 64 << 20
"""until the learner says how much it takes"""
_KEPT_BYTES = 32 << 20
"""of spooled samples that are kept in memory too, so that they need not be read again to be sent"""
_WRITTEN_AT_ONCE = 32
_RETRY_SECONDS = 0.05
_DISK_RETRY_SECONDS = 1.0
_CLOSED_SECONDS = 1.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class OutboxStats:
    queued: int
    """samples not spooled yet"""
    spooled: int
    """samples spooled and not committed"""
    spooled_bytes: int
    sent_bytes: int
    """sent and not committed"""
    blocked_seconds: float
    """that there was no room"""


@dataclass(frozen=True, slots=True)
class _Sent:
    size: int
    at: float


class Outbox:
    """Its methods may be called from any thread and return at once, but for `wait_until_empty` and `stop`."""

    def __init__(
        self, socket: EngineSocket, spool: Spool, on_error: Callable[[str], None], on_event: Callable[[str], None]
    ) -> None:
        """
        Args:
            on_error: gets the reason, once, when the spool cannot be written any more.
            on_event: gets a line when the disk is full, and when it is not any more.
        """
        self._socket, self._spool, self._on_error, self._on_event = socket, spool, on_error, on_event
        self._changed = threading.Condition()
        self._queue: deque[tuple[SampleId, Sequence[bytes]]] = deque()
        self._writing: list[tuple[SampleId, Sequence[bytes]]] = []
        self._unsent: OrderedDict[SampleId, None] = OrderedDict()
        self._kept: dict[SampleId, Sequence[bytes]] = {}
        self._kept_bytes = 0
        self._uncommitted: dict[SampleId, _Sent] = {}
        self._sent_bytes = 0
        self._window = _WINDOW_SAMPLES, _WINDOW_BYTES
        self._open = False
        self._closed_since = time.monotonic()
        self._forgotten = False
        self._disk_full = False
        self._failed = False
        self._stopping = False
        self._blocked_seconds = 0.0
        self._blocked_since: float | None = None
        self._thread = threading.Thread(target=self._write, name="spool", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, *messages: tuple[SampleId, Sequence[bytes]]) -> None:
        """Queue messages (sample, frames), which are spooled together where there is room; once the link is dead, what
        is queued is spooled at `stop`."""
        with self._changed:
            self._queue += messages
            self._update_blocked()
            self._changed.notify_all()

    @property
    def has_room(self) -> bool:
        """Whether the engine should take new leases."""
        with self._changed:
            self._update_blocked()
            return self._blocked_since is None

    def set_window(self, samples: int, size: int) -> None:
        """How many samples and bytes may be sent and not committed; one sample always may."""
        with self._changed:
            self._window = max(1, samples), size
            self._changed.notify_all()

    def connected(self, received: Sequence[SampleId]) -> None:
        """The learner has answered HELLO and has these samples; all others in the spool are sent."""
        with self._changed:
            known = set(received)
            pending = self._spool.pending()
            self._unsent = OrderedDict.fromkeys(sample for sample in pending if sample not in known)
            for sample in known:
                self._forget_kept(sample)
            now = time.monotonic()
            # They count against the window as the learner counts them: received, and not on its disk yet.
            self._uncommitted = {s: _Sent(self._spool.size_of(s), now) for s in pending if s in known}
            self._sent_bytes = sum(sent.size for sent in self._uncommitted.values())
            self._open = True
            self._changed.notify_all()

    def disconnected(self) -> None:
        """Nothing is sent until the learner answers the next HELLO."""
        with self._changed:
            if self._open:
                self._closed_since = time.monotonic()
            self._open = False
            self._changed.notify_all()

    def committed(self, samples: Sequence[SampleId]) -> None:
        """These are safe with the learner, or unwanted."""
        with self._changed:
            self._spool.forget(samples)
            self._forgotten = True
            for sample in samples:
                if (sent := self._uncommitted.pop(sample, None)) is not None:
                    self._sent_bytes -= sent.size
                self._unsent.pop(sample, None)
                self._forget_kept(sample)
            self._changed.notify_all()
        failpoint("ack.handled")

    def overdue(self, seconds: float) -> bool:
        """Whether a sample was sent so long ago and is not committed: it, or its answer, may have been lost."""
        with self._changed:
            oldest = next(iter(self._uncommitted.values()), None)
            return self._open and oldest is not None and time.monotonic() - oldest.at > seconds

    def leases(self) -> set[int]:
        """Leases with samples that are not in the spool yet."""
        with self._changed:
            return {sample[0] for sample, _ in self._writing} | {sample[0] for sample, _ in self._queue}

    def wait_until_empty(self, timeout: float) -> bool:
        """Until everything put so far is committed; False after `timeout` seconds, or when it cannot happen soon: the
        link is dead, or the learner away for a second."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not (self._empty() or self._failed or self._stopping):
                now = time.monotonic()
                if now >= deadline or (not self._open and now - self._closed_since > _CLOSED_SECONDS):
                    break
                self._changed.wait(min(deadline - now, _CLOSED_SECONDS))
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
            self._update_blocked()
            blocked = self._blocked_seconds
            if self._blocked_since is not None:
                blocked += time.monotonic() - self._blocked_since
            queued = len(self._queue) + len(self._writing)
            return OutboxStats(queued, len(self._spool), self._spool.size, self._sent_bytes, blocked)

    def _empty(self) -> bool:
        return not (self._queue or self._writing or len(self._spool))

    def _update_blocked(self) -> None:
        blocked = len(self._queue) >= _QUEUE or self._disk_full or self._spool.full
        now = time.monotonic()
        if blocked and self._blocked_since is None:
            self._blocked_since = now
        elif not blocked and self._blocked_since is not None:
            self._blocked_seconds += now - self._blocked_since
            self._blocked_since = None

    # ---- the thread ----------------------------------------------------------------------------------------------

    def _write(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._has_work() or self._stopping)
                    stopping = self._stopping
                self._spool_queued(stopping)
                if stopping and not (self._queue or self._writing):
                    return
                self._send_spooled()
        except (OSError, UsageError) as error:
            reason = f"the spool {self._spool.folder} cannot be written ({getattr(error, 'strerror', '') or error})"
            self.fail()
            self._on_error(reason)
        except Exception as error:  # a defect: nobody must wait for a thread that has ended
            self.fail()
            self._on_error(f"the engine's spool thread failed: {type(error).__name__}: {error}")
            raise

    def _has_work(self) -> bool:
        waiting = bool(self._queue or self._writing) and not self._disk_full
        emptied = self._forgotten and not len(self._spool)
        return (waiting and (self._forgotten or not self._spool.full)) or self._may_send() or self._disk_full or emptied

    def _may_send(self) -> bool:
        samples, size = self._window
        within = not self._uncommitted or (len(self._uncommitted) < samples and self._sent_bytes < size)
        return self._open and bool(self._unsent) and within

    def _spool_queued(self, stopping: bool) -> None:
        try:
            self._spool.reclaim()
            self._choose_batch(stopping)
            written = self._spool.append(self._writing) if self._writing else []
        except OSError as error:
            if error.errno not in _FULL or stopping:
                raise
            self._wait_for_space()
            return
        with self._changed:
            if self._disk_full:
                self._disk_full = False
                self._on_event(f"there is space for the spool {self._spool.folder} again")
            fresh = set(written)
            for sample, frames in self._writing:
                if sample in fresh:
                    self._keep(sample, frames)
            self._writing = []
            self._unsent.update(dict.fromkeys(written))
            self._update_blocked()
            self._changed.notify_all()

    def _choose_batch(self, stopping: bool) -> None:
        """Move samples from the queue to `_writing`, up to the one that fills the spool."""
        with self._changed:
            self._forgotten = False
            room = self._spool.room
            while self._queue and len(self._writing) < _WRITTEN_AT_ONCE and (room > 0 or stopping):
                self._writing.append(self._queue.popleft())
                room -= sum(map(len, self._writing[-1][1]))

    def _wait_for_space(self) -> None:
        with self._changed:
            if not self._disk_full:
                self._disk_full = True
                self._on_event(f"no space for the spool {self._spool.folder}; nothing new is sampled until there is")
            self._update_blocked()
            self._changed.wait_for(lambda: self._stopping, _DISK_RETRY_SECONDS)

    def _keep(self, sample: SampleId, frames: Sequence[bytes]) -> None:
        size = sum(map(len, frames))
        if self._kept_bytes + size <= _KEPT_BYTES and sample not in self._kept:
            self._kept[sample] = frames
            self._kept_bytes += size

    def _forget_kept(self, sample: SampleId) -> Sequence[bytes] | None:
        frames = self._kept.pop(sample, None)
        if frames is not None:
            self._kept_bytes -= sum(map(len, frames))
        return frames

    def _send_spooled(self) -> None:
        while True:
            with self._changed:
                if not self._may_send():
                    return
                sample = next(iter(self._unsent))
                frames = self._kept.get(sample) or self._spool.read(sample)
                # Under the lock, so that a new connection in between cannot have the sample sent twice.
                if frames is not None and not self._socket.send(frames):
                    self._changed.wait(_RETRY_SECONDS)
                    return
                self._unsent.pop(sample, None)
                self._forget_kept(sample)
                if frames is not None:
                    size = sum(map(len, frames))
                    self._uncommitted[sample] = _Sent(size, time.monotonic())
                    self._sent_bytes += size
            failpoint("sample.sent")
