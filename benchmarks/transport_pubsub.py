"""The stream ours is compared with: PUB/SUB of msgpack lists without acknowledgement, as some trainers send samples.

It loses what a slow reader does not take. Written here, it shares nothing with ours.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

FIELDS_BYTES = 18
"""a token of ours: id, log-prob, entropy, version, sampler, role; the lists have no samplers and roles"""
_QUEUED = 10
_FILE_BYTES = 256 << 20


class ListTrajectory(msgspec.Struct, array_like=True, gc=False):
    """A sample as lists of numbers, the usual way."""

    index: int
    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    entropies: list[float]
    versions: list[int]
    submitted: float

    def arrays(self) -> list[np.ndarray]:
        """As a learner needs them."""
        fields = ((self.token_ids, "u4"), (self.logprobs, "f4"), (self.entropies, "f4"), (self.versions, "u4"))
        return [np.array(values, dtype) for values, dtype in fields]


class _File:
    """Messages, one after the other; begun anew from time to time, as the space of what was used comes back."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = 0

    def append(self, message: bytes) -> None:
        self._size += os.write(self._descriptor, message)
        if self._size > _FILE_BYTES:
            os.ftruncate(self._descriptor, 0)
            self._size = 0

    def close(self) -> None:
        os.close(self._descriptor)


def pubsub(seconds: float, tokens: int, stall: float = 0.0, folder: Path | None = None) -> dict[str, Any]:
    """Its rate; with `stall`, how much is lost while the reader sleeps for so long in the middle.

    Args:
        folder: both sides write every message to a file here, and the reader makes arrays of the lists.
    """
    context = zmq.Context()
    reader = context.socket(zmq.SUB)
    reader.setsockopt(zmq.RCVHWM, _QUEUED)
    reader.setsockopt(zmq.RCVTIMEO, 5000)
    reader.setsockopt(zmq.SUBSCRIBE, b"")
    port = reader.bind_to_random_port("tcp://127.0.0.1")
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.transport_pubsub", json.dumps({
            "address": f"tcp://127.0.0.1:{port}", "tokens": tokens, "folder": str(folder) if folder else "",
        })],
        cwd=Path(__file__).resolve().parents[1],
    )  # fmt: skip
    file = _File(folder / "received") if folder else None
    decoder = msgspec.msgpack.Decoder(ListTrajectory)
    first = decoder.decode(reader.recv()).index
    began, last, received, size = time.monotonic(), first, 0, 0
    stalled = stall == 0.0
    while time.monotonic() - began < seconds + stall:
        if not stalled and time.monotonic() - began > seconds / 2:
            time.sleep(stall)
            stalled = True
        data = reader.recv()
        if file is not None:
            file.append(data)
        sample = decoder.decode(data)
        if file is not None:
            sample.arrays()
        last, size, received = sample.index, size + len(data), received + 1
    took = time.monotonic() - began
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    reader.close(linger=0)
    context.term()
    if file is not None:
        file.close()
    return {
        "row": "stream", "system": "pubsub-lists", "tokens": tokens, "trajectories_per_second": received / took,
        "MB_per_second": received * tokens * FIELDS_BYTES / took / 1e6,
        "wire_bytes_per_token": size / received / tokens, "lost": last - first - received,
    }  # fmt: skip


def publish(address: str, tokens: int, folder: str) -> None:
    """Send without end and without being told what arrives; begins, as ours does, with a generator's arrays."""
    context = zmq.Context()
    publisher = context.socket(zmq.PUB)
    publisher.setsockopt(zmq.SNDHWM, _QUEUED)
    publisher.connect(address)
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 1000, tokens)
    logprobs, entropies = -generator.random(tokens, np.float32), generator.random(tokens, np.float32)
    versions = np.zeros(tokens, np.int64)
    encoder = msgspec.msgpack.Encoder()
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    file = _File(Path(folder) / "sent") if folder else None
    time.sleep(0.5)  # what is sent before the subscription arrives is lost
    sent = 0
    while not stopping.is_set():
        data = encoder.encode(ListTrajectory(
            sent, [1, 7], ids.tolist(), logprobs.tolist(), entropies.tolist(), versions.tolist(), time.monotonic()
        ))  # fmt: skip
        if file is not None:
            file.append(data)
        publisher.send(data)
        sent += 1
    publisher.close(linger=1000)
    context.term()


if __name__ == "__main__":
    publish(**json.loads(sys.argv[1]))
