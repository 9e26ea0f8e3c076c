"""The learner's side of broadcasts: a thread and a process group for every engine that asks for one.

What is broadcast is read from the publication's folder, which is mapped into memory: its pages are there still, the
weights that are trained may change meanwhile, an engine gets what everybody else can read, and nothing is copied but
the piece on its way.
"""

import itertools
import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from pipeline.codec import encode
from pipeline.failpoints import failpoint
from pipeline.messages import (
    MOST_TENSORS,
    LearnerMessage,
    WeightsClosed,
    WeightsGroup,
    WeightsJoin,
    WeightsManifest,
    WeightsTensor,
    WeightsWanted,
)
from pipeline.weights.base import WeightsError
from pipeline.weights.buckets import BUCKET_BYTES, Bucket, Slot, buckets, in_order, seal
from pipeline.weights.filesystem import versions
from pipeline.weights.group import Meeting, TransferFailed, TransferGroup, backend_for, device_name

_DTYPES: dict[str, Any] = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_MOST_WAITING = 4
"""groups of one engine that have not ended: one that is never joined takes its time to"""


@dataclass(slots=True, eq=False)
class _Member:
    """An engine that receives."""

    peer: bytes
    join: WeightsJoin
    group: int
    name: str
    wanted: queue.SimpleQueue[int | None] = field(default_factory=queue.SimpleQueue)
    """versions; None: it is over"""
    thread: threading.Thread | None = None


class WeightsBroadcaster:
    """Sends publications to engines. What an engine does or fails to do is felt by its own thread alone."""

    def __init__(
        self, root: Path, meeting: Meeting, device: torch.device, seconds: float, on_event: Callable[[str], None],
        bucket_bytes: int = BUCKET_BYTES, max_message_bytes: int = 1 << 20,
    ) -> None:  # fmt: skip
        """
        Args:
            root: folder of the versions.
            meeting: where engines' processes come together with this one.
            device: that the learner computes on; a group of GPUs alone is NCCL's.
            seconds: that one side waits for the other.
            on_event: gets a line about a group that came about or failed; from any thread.
            bucket_bytes: of a broadcast, at most; a multiple of 16.
            max_message_bytes: that engines accept; a manifest must not end their connection.
        """
        self._max_message_bytes = max_message_bytes
        self._root, self._meeting, self._device = root, meeting, device
        self._seconds, self._on_event, self._bucket_bytes = seconds, on_event, bucket_bytes
        self._lock = threading.Lock()
        self._members: dict[bytes, _Member] = {}
        self._alive: set[_Member] = set()
        self._numbers = itertools.count(1)

    def start(self, send: Callable[[bytes, LearnerMessage], None]) -> None:
        """`send` queues a message for a peer."""
        self._send = send

    def handle(self, peer: bytes, message: WeightsJoin | WeightsWanted, name: str = "an engine") -> None:
        """What an engine asks for; returns at once.

        Args:
            name: of the engine, for people.
        """
        with self._lock:
            if isinstance(message, WeightsWanted):
                member = self._members.get(peer)
                if member is not None and member.group == message.group:
                    member.wanted.put(message.version)
                return
            self._end(peer)
            if sum(member.peer == peer for member in self._alive) >= _MOST_WAITING:
                reason = f"{_MOST_WAITING} of its groups for weights have not ended yet"
                self._send(peer, WeightsClosed(group=0, reason=reason))
                return
            member = _Member(peer, message, next(self._numbers), name)
            member.thread = threading.Thread(target=self._serve, args=(member,), name="broadcast", daemon=True)
            self._members[peer] = member
            self._alive.add(member)
            member.thread.start()

    def gone(self, peer: bytes) -> None:
        """The engine is not connected any more."""
        with self._lock:
            self._end(peer)

    def stop(self) -> None:
        """No more transfers; one that hangs is left to end with the process."""
        with self._lock:
            threads = [member.thread for member in self._alive]
            for peer in list(self._members):
                self._end(peer)
        for thread in threads:
            if thread is not None:
                thread.join(1.0)

    def _end(self, peer: bytes) -> None:
        if (member := self._members.pop(peer, None)) is not None:
            member.wanted.put(None)

    # ---- a thread ------------------------------------------------------------------------------------------------

    def _serve(self, member: _Member) -> None:
        group: TransferGroup | None = None
        version = -1
        try:
            group = self._lead(member)
            while (version := self._next(member)) >= 0:
                self._broadcast(member, group, version)
        except (WeightsError, OSError, RuntimeError) as error:  # RuntimeError: of a device that is out of memory, say
            what = f"broadcasting weights version {version}" if version >= 0 else "a process group for weights"
            self._on_event(f"{member.name}: {what} failed ({error}); it reads files instead")
            if not self._is_over(member):
                self._send(member.peer, WeightsClosed(group=member.group, reason=str(error)))
        finally:
            if group is not None:
                group.close()
            with self._lock:
                self._alive.discard(member)

    def _next(self, member: _Member) -> int:
        """The version that is wanted next; -1: none ever."""
        wanted = member.wanted.get()
        return -1 if wanted is None else wanted

    def _is_over(self, member: _Member) -> bool:
        """Whether nobody is there to be told anything."""
        with self._lock:
            return self._members.get(member.peer) is not member

    def _lead(self, member: _Member) -> TransferGroup:
        devices = (device_name(self._device), *member.join.devices)
        message = WeightsGroup(
            group=member.group, address=self._meeting.address, backend=backend_for(devices),
            size=len(devices), seconds=self._seconds,
        )  # fmt: skip
        self._send(member.peer, message)
        group = self._meeting.lead(message, self._device)
        self._on_event(f"{member.name}: weights go to {len(devices) - 1} of its processes over {message.backend}")
        return group

    def _broadcast(self, member: _Member, group: TransferGroup, wanted: int) -> None:
        """The newest version, which is the one that is wanted or a newer one."""
        version, opened = self._open(wanted)
        with opened as file:
            tensors = _described(file, member.join.order)
            self._announce(member, WeightsManifest(
                group=member.group, version=version, bucket_bytes=self._bucket_bytes, tensors=tensors
            ))  # fmt: skip
            pieces = _Pieces(file, version, self._bucket_bytes, group.device)
            for bucket in buckets(tensors, self._bucket_bytes):
                pieces.broadcast(bucket, group)

    def _announce(self, member: _Member, manifest: WeightsManifest) -> None:
        size, most = len(encode(manifest)[0]), self._max_message_bytes
        if len(manifest.tensors) > MOST_TENSORS:
            raise TransferFailed(f"it has {len(manifest.tensors)} tensors, more than {MOST_TENSORS}")
        if size > most:
            raise TransferFailed(
                f"the list of its tensors takes {size} bytes, more than transport.max_message_bytes = {most}; raise it "
                "on both sides"
            )
        self._send(member.peer, manifest)

    def _open(self, wanted: int) -> tuple[int, AbstractContextManager[Any]]:
        newest = max(versions(self._root), default=-1)
        if newest < wanted:
            raise TransferFailed(f"version {wanted} is not there")
        path = self._root / f"v{newest}" / "model.safetensors"
        try:
            return newest, safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise TransferFailed(f"{path} cannot be read ({error})") from error


def _described(file: Any, first: tuple[str, ...]) -> tuple[WeightsTensor, ...]:
    """The tensors of a safetensors file in the order of their broadcast."""
    found = []
    for name in in_order(file.keys(), first):
        part = file.get_slice(name)
        if (kind := part.get_dtype()) not in _DTYPES:
            raise TransferFailed(f"tensor {name} is of type {kind}, which is not broadcast")
        found.append(WeightsTensor(name=name, dtype=_DTYPES[kind], shape=tuple(part.get_shape())))
    return tuple(found)


class _Pieces:
    """Buckets of a file, piece by piece through one buffer."""

    def __init__(self, file: Any, version: int, limit: int, device: torch.device) -> None:
        self._file, self._version, self._limit, self._device = file, version, limit, device
        self._buffer = np.empty(0, np.uint8)

    def broadcast(self, bucket: Bucket, group: TransferGroup) -> None:
        """
        Raises:
            TransferFailed: the engine is gone.
        """
        sources = [(slot, self._bytes(slot)) for slot in bucket.slots]
        words = 0
        for begin, end in bucket.pieces(self._limit):
            piece = self._room(end - begin)
            for slot, content in sources:
                _copy(piece, begin, slot, content)
            last = end == bucket.bytes
            whole = piece.view(np.int64)
            with np.errstate(over="ignore"):
                words += int(whole[:-1].sum() if last else whole.sum())
            if last:
                whole[-1] = seal(words, self._version, bucket)
            group.broadcast(torch.from_numpy(piece).to(self._device))
            failpoint("weights.sent")

    def _room(self, size: int) -> np.ndarray:
        """Zeros: between tensors there are gaps."""
        if len(self._buffer) < size:
            self._buffer = np.empty(size, np.uint8)
        piece = self._buffer[:size]
        piece.fill(0)
        return piece

    def _bytes(self, slot: Slot) -> np.ndarray:
        tensor: torch.Tensor = self._file.get_tensor(slot.tensor.name)
        found: np.ndarray = tensor.reshape(-1).view(torch.uint8).numpy()
        return found


def _copy(piece: np.ndarray, begin: int, slot: Slot, content: np.ndarray) -> None:
    """The part of a tensor that lies in the piece of its bucket from `begin` on."""
    low, high = max(slot.offset, begin), min(slot.offset + slot.bytes, begin + len(piece))
    if low < high:
        piece[low - begin : high - begin] = content[low - slot.offset : high - slot.offset]
