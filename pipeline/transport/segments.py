"""An append-only log of records in segment files, the base of the engine's spool and the learner's journal.

A record is `magic, length, checksum, payload`; its offset is its byte position in the log as a whole, and a segment
file is named by the offset it begins at. The checksum covers offset and length too, so bytes of a record that were
copied elsewhere (a payload may hold anything) never pass for a record.

What is synced: `append` with `sync=True` returns after fsync of the data; a new segment is synced with its folder
before it is written to, and a full one before the next begins. So only the last segment can have a torn tail, which
opening the log cuts off; damage anywhere else is skipped up to the next valid record, and counted. With `fsync=False`
nothing is synced: what was written survives the process, not the machine.
"""

import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from struct import Struct

from pipeline.durable import sync
from pipeline.failpoints import armed, failpoint
from pipeline.transport.checksum import crc32

MAGIC = b"\x93RLg"
_HEADER = Struct("<4sII")
_CHECKED = Struct("<QI")
_SUFFIX = ".log"
_MOST_PARTS = 1024
"""that one writev takes"""


def write_all(descriptor: int, data: bytes) -> None:
    """`os.write` until all is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _write_parts(descriptor: int, parts: Sequence[bytes]) -> None:
    """One after the other, without putting them together in memory first."""
    for begin in range(0, len(parts), _MOST_PARTS):
        some = parts[begin : begin + _MOST_PARTS]
        written = os.writev(descriptor, some)
        if written < sum(map(len, some)):  # no space, as a rule: writing on says so
            write_all(descriptor, b"".join(some)[written:])


class DamagedRecord(OSError):
    """There is no intact record at an offset; others are not concerned."""


class SegmentLog:
    """One process writes a log; its methods may be called from any thread, and wait for each other's disk work."""

    def __init__(
        self, folder: Path, segment_bytes: int = 16 << 20, *, fsync: bool = True, name: str = "journal"
    ) -> None:
        """Opens the log in `folder`, created when missing, and repairs its tail.

        Args:
            folder: where the segment files are.
            segment_bytes: a segment this long is not appended to; a single append is never split.
            fsync: False leaves it to the kernel when data reaches the disk.
            name: of its failpoints.
        """
        self.corrupt = 0
        """stretches of damaged bytes skipped while reading"""
        self.torn_bytes = 0
        """cut off the end when the log was opened"""
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._fsync, self._name = fsync, name
        self._lock = threading.Lock()
        self._broken = ""
        folder.mkdir(parents=True, exist_ok=True)
        self._sizes = {int(path.stem): path.stat().st_size for path in sorted(folder.glob(f"*{_SUFFIX}"))}
        if not self._sizes:
            self._create(0)
        else:
            self._repair_tail()
        self._count()
        self._active = os.open(self._path(self._base), os.O_WRONLY | os.O_APPEND)

    @property
    def end(self) -> int:
        """Offset after the last record; the next one gets this offset or a higher one. Never waits for the disk."""
        return self._end

    @property
    def size(self) -> int:
        """Bytes on disk. Never waits for the disk."""
        return self._size

    @property
    def broken(self) -> bool:
        """A sync failed: nothing more can be written."""
        return bool(self._broken)

    def append(self, payloads: Sequence[Sequence[bytes]], sync: bool = True) -> list[int]:
        """Write records in one go; all of them are in the log afterwards, or none.

        Args:
            payloads: one a record, in parts that are written one after the other.
            sync: return after fsync.

        Returns:
            The offset of each.

        Raises:
            OSError: the disk would not take them. After a failed fsync what is on disk is unknown, and the log
                refuses further records.
        """
        with self._lock:
            if self._broken:
                raise OSError(f"the log in {self._folder} failed before: {self._broken}")
            if self._sizes[self._base] >= self._segment_bytes:
                self._rotate()
            offsets, parts, end = [], [], self._end
            for payload in payloads:
                length = sum(map(len, payload))
                offsets.append(end)
                parts += [_HEADER.pack(MAGIC, length, _checksum(end, length, payload)), *payload]
                end += _HEADER.size + length
            self._write(parts, end - self._end, sync)
            return offsets

    def read(self, offset: int) -> bytes:
        """The payload of the record at an offset that `append` or `records` gave.

        Raises:
            DamagedRecord: there is no intact record there.
        """
        with self._lock:
            base = max((base for base in self._sizes if base <= offset), default=None)
            if base is None:
                raise DamagedRecord(f"offset {offset} is before the log in {self._folder}")
            with self._path(base).open("rb") as file:
                file.seek(offset - base)
                header = file.read(_HEADER.size)
                length = _HEADER.unpack(header)[1] if len(header) == _HEADER.size else 0
                payload = _parse(header + file.read(length), 0, offset)
        if payload is None:
            raise DamagedRecord(f"the record at offset {offset} of the log in {self._folder} is damaged")
        return payload

    def records(self, start: int = 0) -> Iterator[tuple[int, bytes]]:
        """(offset, payload) of every intact record from an offset on, in order; what is appended meanwhile may be
        left out."""
        with self._lock:
            bases = sorted(self._sizes)
        for base, following in zip(bases, [*bases[1:], None], strict=True):
            if following is not None and following <= start:
                continue
            with self._lock:
                data = _read(self._path(base), self._sizes.get(base, 0))
            for offset, payload in _scan(data, base):
                if payload is None:
                    with self._lock:
                        self.corrupt += 1
                elif offset >= start:
                    yield offset, payload

    def drop_before(self, offset: int) -> None:
        """Delete segments that hold nothing at or after an offset; the one being written goes when it is at least a
        quarter full, else later."""
        with self._lock:
            self._delete_before(offset)
            if offset >= self._end and self._sizes[self._base] >= max(1, self._segment_bytes // 4):
                self._rotate()
                self._delete_before(offset)

    def clear(self) -> None:
        """Delete all records at once; offsets of those that come next may have been given before. Nothing is synced: a
        power cut may bring records back."""
        with self._lock:
            if self._sizes[self._base] and not self._broken:
                os.ftruncate(self._active, 0)
                self._sizes[self._base] = 0
            self._delete_before(self._base)

    def close(self) -> None:
        """Sync and close; closing twice is fine."""
        with self._lock:
            if self._active >= 0:
                if not self._broken and self._fsync:
                    os.fsync(self._active)
                os.close(self._active)
                self._active, self._broken = -1, "it is closed"

    def _delete_before(self, offset: int) -> None:
        for base, following in pairwise(sorted(self._sizes)):
            if following <= offset:
                self._path(base).unlink()
                del self._sizes[base]
        self._count()

    @property
    def _base(self) -> int:
        return max(self._sizes)

    def _count(self) -> None:
        self._end = self._base + self._sizes[self._base]
        self._size = sum(self._sizes.values())

    def _path(self, base: int) -> Path:
        return self._folder / f"{base:020d}{_SUFFIX}"

    def _create(self, base: int) -> None:
        descriptor = os.open(self._path(base), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.close(descriptor)
        if self._fsync:
            sync(self._folder)
        self._sizes[base] = 0

    def _rotate(self) -> None:
        self._sync()
        self._create(self._end)
        os.close(self._active)
        self._active = os.open(self._path(self._base), os.O_WRONLY | os.O_APPEND)

    def _write(self, parts: list[bytes], size: int, sync: bool) -> None:
        base = self._base
        try:
            failpoint(f"{self._name}.write")
            if armed(f"{self._name}.torn"):
                data = b"".join(parts)
                write_all(self._active, data[: size // 2])
                failpoint(f"{self._name}.torn")
                parts = [data[size // 2 :]]
            _write_parts(self._active, parts)
        except OSError:
            self._undo(base)
            raise
        if sync:
            self._sync()
        self._sizes[base] += size
        self._count()
        failpoint(f"{self._name}.synced")

    def _sync(self) -> None:
        try:
            failpoint(f"{self._name}.fsync")
            if self._fsync:
                os.fsync(self._active)
        except OSError as error:
            # The kernel may have thrown the dirty pages away: a second fsync that succeeds would prove nothing.
            self._broken = str(error)
            raise

    def _undo(self, base: int) -> None:
        """Cut off a record that was written in part, so that the next one is found."""
        try:
            os.ftruncate(self._active, self._sizes[base])
        except OSError as error:
            self._broken = str(error)

    def _repair_tail(self) -> None:
        base, end = self._base, 0
        size = self._sizes[base]
        for offset, payload in _scan(_read(self._path(base), size), base):
            if payload is not None:
                end = offset - base + _HEADER.size + len(payload)
        if end < size:
            os.truncate(self._path(base), end)
            self._sizes[base] = end
            self.torn_bytes = size - end


def _read(path: Path, size: int) -> mmap.mmap | bytes:
    """The first `size` bytes of a file, in pages of their own: allocated and freed as one block, so much would raise
    the size from which the C library gives memory back, for as long as the process lives."""
    if not size:
        return b""
    data = mmap.mmap(-1, size)
    with path.open("rb", buffering=0) as file:
        view = memoryview(data)
        while view and (count := file.readinto(view)):
            view = view[count:]
    return data


def _checksum(offset: int, length: int, payload: Sequence[bytes]) -> int:
    value = crc32(_CHECKED.pack(offset, length))
    for part in payload:
        value = crc32(part, value)
    return value


def _parse(data: bytes | mmap.mmap, position: int, offset: int) -> bytes | None:
    """The payload of the record at a position of a segment's bytes, None when there is no intact one."""
    if len(data) < position + _HEADER.size:
        return None
    magic, length, checksum = _HEADER.unpack_from(data, position)
    start = position + _HEADER.size
    if magic != MAGIC or len(data) < start + length:
        return None
    payload = data[start : start + length]
    return payload if _checksum(offset, length, [payload]) == checksum else None


def _scan(data: bytes | mmap.mmap, base: int) -> Iterator[tuple[int, bytes | None]]:
    """(offset, payload) of each intact record of a segment, (offset, None) of each stretch of damage."""
    position = 0
    while position < len(data):
        payload = _parse(data, position, base + position)
        yield base + position, payload
        if payload is None:
            position = _next_record(data, position + 1, base)
        else:
            position += _HEADER.size + len(payload)


def _next_record(data: bytes | mmap.mmap, position: int, base: int) -> int:
    while (position := data.find(MAGIC, position)) >= 0:
        if _parse(data, position, base + position) is not None:
            return position
        position += 1
    return len(data)
