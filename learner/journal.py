"""The learner's journal: what was granted and what arrived, on disk before it is acknowledged.

One thread writes and syncs, many records at a time; nobody else waits for the disk. Together with a checkpoint the
journal restores every sample that was committed and not yet trained.
"""

import errno
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from pipeline.errors import RunFailed, UsageError
from pipeline.transport.frames import pack_frames, unpack_frames
from pipeline.transport.segments import SegmentLog


class Granted(msgspec.Struct, frozen=True, array_like=True, tag="g"):
    """A lease went to an engine."""

    lease: int
    epoch: int
    version: int
    producer: str


class Arrived(msgspec.Struct, frozen=True, array_like=True, tag="a"):
    """The first valid trajectory of a sample, as it travelled."""

    lease: int
    sample: int
    frames: list[bytes]


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="f"):
    """A sample that will not arrive."""

    lease: int
    sample: int
    reason: str
    detail: str


class Dropped(msgspec.Struct, frozen=True, array_like=True, tag="d"):
    """A whole lease that will not be trained."""

    lease: int
    reason: str


Record = Granted | Arrived | Failed | Dropped

_DISK_RETRY_SECONDS = 1.0
_FULL = (errno.ENOSPC, errno.EDQUOT)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


def _encode(record: Record) -> list[bytes]:
    """A record's parts; a trajectory's frames are not copied."""
    if isinstance(record, Arrived):
        return pack_frames([_encoder.encode(Arrived(record.lease, record.sample, [])), *record.frames])
    return pack_frames([_encoder.encode(record)])


def _decode(payload: bytes) -> Record:
    head, *frames = unpack_frames(payload)
    record = _decoder.decode(head)
    return msgspec.structs.replace(record, frames=frames) if isinstance(record, Arrived) else record


class Journal:
    """Its methods may be called from any thread; callbacks run in the writer's thread."""

    def __init__(self, folder: Path, segment_bytes: int = 16 << 20, *, fsync: bool = True) -> None:
        """Opens the journal in `folder`, created when missing, and starts the writer.

        Args:
            fsync: see `pipeline.transport.segments`; without it an acknowledgement outlives the process, not the
                machine.

        Raises:
            UsageError: the folder cannot be written.
        """
        self.error: OSError | None = None
        """why nothing is written any more; from then on nothing is acknowledged either"""
        self.on_error: Callable[[OSError], None] = lambda error: None
        self.after_sync: Callable[[], None] = lambda: None
        """called after the callbacks of all records that were synced together"""
        self.stalled = False
        """the disk is full: nothing is acknowledged until there is space"""
        self.on_stall: Callable[[bool], None] = lambda stalled: None
        self._folder = folder
        try:
            self._log = SegmentLog(folder, segment_bytes, fsync=fsync, name="journal")
        except OSError as error:
            raise UsageError(
                f"the journal folder {folder} cannot be used ({error.strerror or error}); choose another run.out"
            ) from error
        self._wake = threading.Condition()
        self._queue: deque[tuple[Record, Callable[[], None] | None]] = deque()
        self._drop_before: int | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    @property
    def position(self) -> int:
        """No record that is not written yet will get an offset below this. Never waits for the disk."""
        return self._log.end

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self._log.size

    @property
    def corrupt(self) -> int:
        """Damaged stretches that `replay` skipped."""
        return self._log.corrupt

    def append(self, record: Record, on_durable: Callable[[], None] | None = None) -> None:
        """Queue a record; `on_durable` is called once it is synced to disk, and never when that fails."""
        with self._wake:
            if self.error is None and not self._closing:
                self._queue.append((record, on_durable))
                self._wake.notify()

    def replay(self, start: int = 0) -> Iterator[tuple[int, Record]]:
        """(offset, record) from an offset on, in the order written; for a journal that is not appended to meanwhile.

        Raises:
            RunFailed: an intact record is not of this version's schema.
        """
        for offset, payload in self._log.records(start):
            try:
                yield offset, _decode(payload)
            except ValueError as error:  # msgspec's are such, too
                raise RunFailed(
                    f"the journal {self._folder} was written by another version ({error}); resume with that version"
                ) from error

    def drop_before(self, offset: int) -> None:
        """Whole segments before an offset are not needed any more; the writer deletes them."""
        with self._wake:
            self._drop_before = offset
            self._wake.notify()

    def close(self) -> None:
        """Write what is queued, then close."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        if self.error is None:
            self._log.close()

    def _write(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._closing or self._drop_before is not None)
                batch, drop_before = list(self._queue), self._drop_before
                self._queue.clear()
                self._drop_before = None
                done = self._closing and not batch
            try:
                self._patiently(drop_before, batch)
                for _, on_durable in batch:
                    if on_durable is not None:
                        on_durable()
                if batch:
                    self.after_sync()
            except OSError as error:
                self._fail(error)
                return
            except Exception as error:  # a defect: nobody must wait for a thread that has ended
                self._fail(OSError(f"{type(error).__name__}: {error}"))
                raise
            if done:
                return

    def _patiently(self, drop_before: int | None, batch: list[tuple[Record, Callable[[], None] | None]]) -> None:
        """Drop and append; while the disk is full, wait for space, unless the journal is being closed."""
        payloads = [_encode(record) for record, _ in batch]
        # Grants alone need no sync: one that a crash loses is granted again, under the same number.
        sync = any(durable for _, durable in batch)
        while True:
            try:
                if drop_before is not None:
                    self._log.drop_before(drop_before)
                if payloads:
                    self._log.append(payloads, sync)
            except OSError as error:
                if error.errno not in _FULL or self._closing or self._log.broken:
                    raise
                self._set_stalled(True)
                with self._wake:
                    self._wake.wait_for(lambda: self._closing, _DISK_RETRY_SECONDS)
                    drop_before, self._drop_before = self._drop_before or drop_before, None
            else:
                self._set_stalled(False)
                return

    def _set_stalled(self, stalled: bool) -> None:
        if stalled != self.stalled:
            self.stalled = stalled
            self.on_stall(stalled)

    def _fail(self, error: OSError) -> None:
        with self._wake:
            self.error = error
            self._queue.clear()
        self.on_error(error)
