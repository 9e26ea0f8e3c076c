"""Puts a bad network between a real engine and a real learner, and looks whether anything is lost or comes twice.

A proxy on the level of bytes delays, cuts, truncates, corrupts, stalls and throttles connections; one on the level of
messages loses, duplicates and reorders what TCP would not.
"""

import asyncio
import contextlib
import json
import random
import signal
import subprocess
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import zmq

from benchmarks.synthetic import BATCH, GROUP, free_address, read_trained, start_engine, start_learner

STEP_SECONDS = 0.02
RECOVERY_SECONDS = 60.0
"""after which a run that does not go on is given up"""
RECOVERED_SECONDS = 5.0
"""after which it must go on"""
BYTE_FAULTS = ("delay", "drop", "truncate", "corrupt", "half-open", "half-open-kept", "slow", "blackout")
MESSAGE_FAULTS = ("lose", "duplicate", "reorder", "all")


class ByteProxy:
    """Passes bytes between engines and the learner, badly while `fault` names a way."""

    def __init__(self, target: str, seed: int) -> None:
        self.address = free_address()
        self.fault = ""
        self._target, self._random = target, random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread.start()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def cut(self) -> None:
        """End the connections there are."""
        self._loop.call_soon_threadsafe(self._close_all)

    def _close_all(self) -> None:
        for writer in list(self._writers):
            writer.close()

    def _run(self) -> None:
        host, port = _host_and_port(self.address)
        self._loop.run_until_complete(asyncio.start_server(self._serve, host, port))
        self._loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.fault == "blackout":
            writer.close()
            return
        try:
            there, back = await asyncio.open_connection(*_host_and_port(self._target))
        except OSError:
            writer.close()
            return
        self._writers |= {writer, back}
        await asyncio.gather(self._pass(reader, back, writer), self._pass(there, writer, back), return_exceptions=True)
        self._writers -= {writer, back}

    async def _pass(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, other: asyncio.StreamWriter
    ) -> None:
        try:
            while data := await source.read(1 << 16):
                await self._forward(data, target)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            for writer in (target, other):
                with contextlib.suppress(OSError):
                    writer.close()

    async def _forward(self, data: bytes, target: asyncio.StreamWriter) -> None:
        match self.fault:
            case "delay":
                await asyncio.sleep(self._random.uniform(0.0, 0.1))
            case "drop" if self._random.random() < 0.05:
                raise OSError("dropped")
            case "truncate" if self._random.random() < 0.05:
                target.write(data[: self._random.randrange(len(data))])
                raise OSError("truncated")
            case "corrupt" if self._random.random() < 0.2:
                damaged = bytearray(data)
                damaged[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
                data = bytes(damaged)
            case "half-open" | "half-open-kept":
                return  # taken, and never delivered: the connection looks alive
            case "slow":
                await asyncio.sleep(len(data) / 50_000)
            case "blackout":
                raise OSError("no network")
        target.write(data)
        await target.drain()


class MessageProxy:
    """Passes whole messages, and loses, repeats or reorders some; one DEALER to the learner for each engine."""

    def __init__(self, target: str, seed: int) -> None:
        self.address = free_address()
        self.fault = ""
        self._target, self._random = target, random.Random(seed)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        context = zmq.Context()
        front = context.socket(zmq.ROUTER)
        front.bind(self.address)
        poller = zmq.Poller()
        poller.register(front, zmq.POLLIN)
        backs: dict[bytes, zmq.Socket] = {}
        held: deque[tuple[zmq.Socket, list[bytes]]] = deque()
        while not self._stopping.is_set():
            ready = dict(poller.poll(20))
            if front in ready:
                peer, *frames = front.recv_multipart()
                if peer not in backs:
                    backs[peer] = context.socket(zmq.DEALER)
                    backs[peer].connect(self._target)
                    poller.register(backs[peer], zmq.POLLIN)
                self._pass(backs[peer], frames, held)
            for peer, back in backs.items():
                if back in ready:
                    self._pass(front, [peer, *back.recv_multipart()], held)
            while held and self._random.random() < 0.5:
                _send(*held.popleft())
        for socket in (front, *backs.values()):
            socket.close(linger=0)
        context.term()

    def _pass(self, socket: zmq.Socket, frames: list[bytes], held: deque) -> None:
        fault = self._random.choice(MESSAGE_FAULTS[:3]) if self.fault == "all" else self.fault
        chosen = self._random.random() < 0.1
        if chosen and fault == "lose":
            return
        if chosen and fault == "reorder":
            held.append((socket, frames))
            return
        _send(socket, frames)
        if chosen and fault == "duplicate":
            _send(socket, frames)


def network_faults(root: Path, *, seconds: float, seed: int, faults: tuple[str, ...] = ()) -> dict[str, Any]:
    """Each fault for some seconds, with a good network after it: did the run go on, how soon, and does it add up?"""
    rows, problems = [], []
    for kind, names in ((ByteProxy, BYTE_FAULTS), (MessageProxy, MESSAGE_FAULTS)):
        chosen = [name for name in names if not faults or name in faults]
        if not chosen:
            continue
        address = free_address()
        folder = root / kind.__name__
        folder.mkdir(parents=True)
        learner = start_learner(
            folder, address=address, steps=10**9, step_seconds=STEP_SECONDS, checkpoint_every=1000, take_seconds=120.0
        )
        proxy = kind(address, seed)
        engines = [start_engine(proxy.address, folder / "spool", connect_timeout=120.0) for _ in range(2)]
        processes = learner, *engines
        try:
            _wait_for_step(folder, 3, RECOVERY_SECONDS, *processes)
            for name in chosen:
                rows.append(_bad_weather(proxy, name, folder, seconds, processes))
                if (recovery := rows[-1]["recovery_seconds"]) > RECOVERED_SECONDS:
                    problems.append(f"{name}: went on {recovery:.1f} s after the network's return")
        except RuntimeError as error:
            problems.append(f"{kind.__name__}: {error}")
        learner.terminate()
        problems += [f"{kind.__name__}: {problem}" for problem in audit_synthetic(folder, learner, engines)]
        proxy.stop()
    return {"rows": rows, "problems": problems}


def _bad_weather(
    proxy: ByteProxy | MessageProxy, name: str, folder: Path, seconds: float, processes: tuple[subprocess.Popen, ...]
) -> dict[str, Any]:
    before = step_of(folder)
    proxy.fault = name
    time.sleep(seconds)
    during = step_of(folder) - before
    proxy.fault = ""
    if name == "half-open" and isinstance(proxy, ByteProxy):
        proxy.cut()  # what was swallowed is gone: a real network would reset the connection now
    recovery = _wait_for_step(folder, step_of(folder) + 3, RECOVERY_SECONDS, *processes)
    return {"fault": name, "seconds": seconds, "steps_during": during, "recovery_seconds": recovery}


def audit_synthetic(folder: Path, learner: subprocess.Popen, engines: list[subprocess.Popen]) -> list[str]:
    """What does not add up after the run has ended."""
    problems = []
    try:
        output, errors = learner.communicate(timeout=60)
        for engine in engines:
            engine.terminate()  # one that came too late to be told that the run is over
        ends = [engine.communicate(timeout=60) for engine in engines]
    except subprocess.TimeoutExpired:
        for process in (learner, *engines):
            process.kill()
        return ["a process did not end"]
    if not output:
        return [f"the learner failed: {errors[-500:]}"]
    result = json.loads(output)
    trained = read_trained(folder / "trained.jsonl")
    if len(trained) != len(set(trained)):
        problems.append(f"{len(trained) - len(set(trained))} samples trained twice")
    if len(trained) != result["trained_samples"] or len(trained) % BATCH:
        problems.append(f"{len(trained)} samples in trained.jsonl, {result['trained_samples']} counted")
    dropped = sum(n for reason, n in result["dropped"].items() if reason not in ("duplicate", "unknown_lease"))
    accounted = len(trained) + dropped + result["buffered"] + result["in_flight"]
    if result["next_lease"] * GROUP != accounted:
        problems.append(f"{result['next_lease'] * GROUP} samples leased, {accounted} accounted for")
    for engine, (said, errors) in zip(engines, ends, strict=True):
        if "drained" not in said and engine.returncode != -signal.SIGTERM:  # which came before it had begun
            problems.append(f"an engine ended badly: {errors[-300:]}")
    return problems


def _wait_for_step(folder: Path, step: int, seconds: float, *processes: subprocess.Popen) -> float:
    """Returns how long it took, without the time for which this machine stood still."""
    waited, before = 0.0, time.monotonic()
    while step_of(folder) < step:
        for process in processes:
            if process.poll() is not None:
                raise RuntimeError(f"a process ended with {process.returncode} during the faults")
        if waited > seconds:
            raise RuntimeError(f"no progress for {seconds:.0f} s after the network was good again")
        time.sleep(0.01)
        now = time.monotonic()
        waited, before = waited + min(now - before, 0.1), now
    return waited


def step_of(folder: Path) -> int:
    """Steps that the synthetic learner in a folder has done."""
    path = folder / "step"
    return int(path.read_text() or 0) if path.exists() else 0


def _send(socket: zmq.Socket, frames: list[bytes]) -> None:
    with contextlib.suppress(zmq.ZMQError):  # the peer has gone
        socket.send_multipart(frames, flags=zmq.DONTWAIT)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host, int(port)
