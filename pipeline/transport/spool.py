"""The engine's spool: finished samples on disk until the learner has committed them.

A spool belongs to one living process at a time, by a lock that the kernel releases when the process dies. The next
engine adopts a spool left behind, as the same producer with the next incarnation, and sends what is in it. Forgetting
is in memory only, until nothing is pending and the spool is emptied: what was committed just before a crash is sent
once more, and the learner recognises it.
"""

import fcntl
import os
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from pipeline.durable import sync
from pipeline.errors import UsageError
from pipeline.messages import SampleId
from pipeline.transport.frames import pack_frames, unpack_frames
from pipeline.transport.segments import DamagedRecord, SegmentLog, write_all

_LARGEST_SEGMENT = 16 << 20
_SEGMENTS = 16


class FolderLock:
    """At most one living process holds a folder."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, folder: Path) -> "FolderLock | None":
        """The lock, or None when a living process has it."""
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return cls(descriptor)

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _Identity(msgspec.Struct, kw_only=True):
    """`identity.json`: who writes the spool, and for which run."""

    incarnation: int
    run: str = ""


class _Place(NamedTuple):
    """Of a sample that is pending."""

    offset: int
    size: int
    """bytes of its frames"""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(SampleId)


class Spool:
    """Made by `acquire`; its methods may be called from any thread."""

    def __init__(self, folder: Path, lock: FolderLock, limit_bytes: int, fsync: bool = True) -> None:
        self.folder = folder
        self.producer = folder.name
        self.damaged = 0
        """samples that turned out to be unreadable when they were to be sent"""
        self._folder_lock = lock
        self._lock = threading.Lock()
        self._limit = limit_bytes
        self._identity = self._next_identity()
        self._log = SegmentLog(
            folder / "log", min(_LARGEST_SEGMENT, limit_bytes // _SEGMENTS), fsync=fsync, name="spool"
        )
        self._places: dict[SampleId, _Place] = {}
        for offset, payload in self._log.records():
            sample, frames = self._decode(payload)
            self._places.setdefault(sample, _Place(offset, sum(map(len, frames))))

    @classmethod
    def acquire(cls, root: Path, limit_bytes: int, *, owner: str = "", fsync: bool = True) -> "Spool":
        """Adopt a spool under `root` that no living process holds, else begin one.

        Args:
            limit_bytes: on disk; from there on it is full.
            owner: fingerprint of the engine's key: only spools that were begun under it are adopted, as the learner
                takes a producer's samples from the holder of its key alone.
            fsync: see `SegmentLog`.

        Raises:
            UsageError: the folder cannot be written, or holds a spool of another version.
        """
        prefix = f"{owner}-" if owner else ""
        try:
            root.mkdir(parents=True, exist_ok=True)
            for folder in sorted(path for path in root.iterdir() if path.is_dir()):
                mine = folder.name.rpartition("-")[0] == owner
                if mine and (lock := FolderLock.acquire(folder)) is not None:
                    return cls(folder, lock, limit_bytes, fsync)
            while True:
                folder = root / f"{prefix}{uuid.uuid4().hex}"
                folder.mkdir()
                # Another engine may look between mkdir and lock and adopt the new folder; then this one tries again.
                if (lock := FolderLock.acquire(folder)) is not None:
                    return cls(folder, lock, limit_bytes, fsync)
        except OSError as error:
            raise UsageError(
                f"the spool folder {root} cannot be used ({error.strerror or error}); choose another output folder"
            ) from error

    @property
    def incarnation(self) -> int:
        """How often the spool was adopted; rises with every process that writes it."""
        return self._identity.incarnation

    @property
    def run(self) -> str:
        """The run its samples belong to; empty before the first learner answered."""
        return self._identity.run

    @property
    def size(self) -> int:
        """Bytes on disk, forgotten samples included until their segment goes."""
        return self._log.size

    @property
    def full(self) -> bool:
        return self.size >= self._limit

    @property
    def room(self) -> int:
        """Bytes until it is full; below zero once it is."""
        return self._limit - self.size

    @property
    def corrupt(self) -> int:
        """Damaged stretches skipped when it was opened, and samples found unreadable since."""
        return self._log.corrupt + self.damaged

    def bind(self, run: str) -> None:
        """Remember, durably, which run the samples are for."""
        if run != self._identity.run:
            self._identity = msgspec.structs.replace(self._identity, run=run)
            self._write_identity()

    def append(self, entries: Sequence[tuple[SampleId, Sequence[bytes]]]) -> list[SampleId]:
        """Write samples (id, message frames), synced to disk, in one go. One thread at a time may do this.

        Returns:
            The samples that are new; one that is pending already, from an earlier incarnation say, stays as it was.

        Raises:
            OSError: the disk would not take them; none of them is in the spool.
        """
        fresh: dict[SampleId, Sequence[bytes]] = {}
        with self._lock:
            for sample, frames in entries:
                if sample not in self._places:
                    fresh.setdefault(sample, frames)
        packed = [pack_frames([_encoder.encode(sample), *frames]) for sample, frames in fresh.items()]
        # Outside the lock: whoever forgets or lists samples must not wait for this fsync.
        offsets = self._log.append(packed) if packed else []
        with self._lock:
            for (sample, frames), offset in zip(fresh.items(), offsets, strict=True):
                self._places[sample] = _Place(offset, sum(map(len, frames)))
        return list(fresh)

    def __len__(self) -> int:
        """Samples not forgotten."""
        return len(self._places)

    def pending(self) -> list[SampleId]:
        """Samples not forgotten, oldest first."""
        with self._lock:
            return list(self._places)

    def size_of(self, sample: SampleId) -> int:
        """Bytes of the frames of a pending sample; 0 when it is not pending."""
        with self._lock:
            place = self._places.get(sample)
        return place.size if place is not None else 0

    def read(self, sample: SampleId) -> list[bytes] | None:
        """The frames of a pending sample; None when it is not pending, or no more: one whose record turns out to be
        damaged is counted and forgotten, and its lease will be issued again."""
        with self._lock:
            place = self._places.get(sample)
        if place is None:
            return None
        try:
            return self._decode(self._log.read(place.offset))[1]
        except DamagedRecord:
            self.damaged += 1
            self.forget([sample])
            return None

    def forget(self, samples: Sequence[SampleId]) -> None:
        """These need not be kept; unknown ones are fine. Their space comes back as whole segments become free."""
        with self._lock:
            for sample in samples:
                self._places.pop(sample, None)

    def close(self) -> None:
        """Give the spool back; what is pending stays on disk for the next engine."""
        self._log.close()
        self._folder_lock.release()

    def reclaim(self) -> None:
        """Delete segments in which everything is forgotten; where nothing is pending, all of them, so that the next
        engine finds nothing. For the thread that appends, as it waits for the disk."""
        with self._lock:
            oldest = next(iter(self._places.values()), None)
        if oldest is None:
            self._log.clear()
        else:
            self._log.drop_before(oldest.offset)

    def _decode(self, payload: bytes) -> tuple[SampleId, list[bytes]]:
        try:
            sample, *frames = unpack_frames(payload)
            return _decoder.decode(sample), frames
        except ValueError as error:  # msgspec's are such, too
            raise UsageError(
                f"the spool {self.folder} was written by another version ({error}); start an engine of that version "
                "once, or delete the folder"
            ) from error

    def _next_identity(self) -> _Identity:
        path = self.folder / "identity.json"
        identity = _Identity(incarnation=0)
        if path.exists():
            try:
                before = msgspec.json.decode(path.read_bytes(), type=_Identity)
            except msgspec.MsgspecError as error:
                raise UsageError(f"{path} is damaged ({error}); delete the folder {self.folder}") from error
            identity = _Identity(incarnation=before.incarnation + 1, run=before.run)
        self._identity = identity
        self._write_identity()
        return identity

    def _write_identity(self) -> None:
        path = self.folder / "identity.json"
        temporary = path.with_suffix(".tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_all(descriptor, msgspec.json.encode(self._identity))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
        sync(self.folder)
