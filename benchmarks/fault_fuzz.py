"""Mutated messages against the parsers, the learner's and the engine's handlers, and the learner's open socket.

A message is taken from a collection of valid ones of every kind, and changed: bits flipped, bytes cut out, repeated or
spliced in, lengths exaggerated, frames lost, repeated or exchanged. Nothing but `BadMessage` may come out of a parser,
nothing at all out of a handler, and memory must not grow.
"""

import random
import socket as stdlib_socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

from benchmarks.results import resident_bytes
from benchmarks.synthetic import BATCH, DIGEST, GROUP, make_hub, make_link, source, start_engine, trajectory
from pipeline import codec, messages
from pipeline.codec import encode, encode_trajectory
from pipeline.engine.link import Failed
from pipeline.messages import SCHEMA, BadMessage, Capabilities
from pipeline.transport.integrity import seal

_INTERESTING = (
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc1",
    b"\x91" * 600,
)
_SETTLED_STEPS = 5
"""after which memory is measured from"""
GROWTH_LIMIT = 32 << 20


def valid_from_engines() -> list[list[bytes]]:
    """One of every kind that an engine sends."""
    hello = messages.Hello(
        schema=SCHEMA, producer="fuzz", incarnation=0, digest=DIGEST, capabilities=Capabilities(entropy=True),
        running=(0, 1), spooled=((0, 0), (1, 2)),
    )  # fmt: skip
    plain = [
        hello,
        messages.Progress(running=(0,), credit=GROUP, version=0, generated_tokens=5, busy_seconds=0.5),
        messages.SampleFailed(lease=0, sample=1, reason="reward_error", detail="no"),
        messages.Leaving(handed_back=(0,)),
        messages.WeightsRequest(version=0, file="config.json", offset=7),
        messages.fatal("broken", "somewhere"),
    ]
    samples = [trajectory(source(lease, 0), lease % GROUP, tokens=8 * lease, producer="fuzz") for lease in range(3)]
    truncated = samples[1]
    truncated.kept_counts = np.full(len(truncated.token_ids), 2, np.uint32)
    truncated.kept_ids = np.stack([truncated.token_ids, truncated.token_ids + 1], 1).ravel().astype(np.uint32)
    truncated.header = msgspec.structs.replace(truncated.header, kept_ids=len(truncated.kept_ids))
    return [encode(message) for message in plain] + [encode_trajectory(sample) for sample in samples]


def valid_from_learner() -> list[list[bytes]]:
    """One of every kind that the learner sends."""
    plain = [
        messages.Welcome(schema=SCHEMA, run="run", version=3, received=((0, 1),)),
        messages.Window(samples=10, bytes=1 << 20),
        messages.Grant(leases=tuple(source(lease, 0) for lease in range(3))),
        messages.Committed(samples=((0, 0), (0, 1))),
        messages.Published(version=4),
        messages.Revoke(leases=(1,)),
        messages.WeightsFiles(version=1, files=(messages.WeightsFile(name="config.json", bytes=2, sha256="0"),)),
        messages.WeightsChunk(version=1, file="config.json", offset=0, data=b"{}"),
        messages.Refused(reason="no", keys=("schema",)),
        messages.Drain(),
        messages.fatal("broken", "somewhere"),
    ]
    return [encode(message) for message in plain]


def mutate(generator: random.Random, frames: list[bytes]) -> list[bytes]:
    """A message with one to four changes."""
    frames = list(frames)
    for _ in range(generator.randint(1, 4)):
        choice = generator.random()
        index = generator.randrange(len(frames)) if frames else 0
        if not frames or choice < 0.04:
            frames.insert(index, generator.randbytes(generator.randrange(40)))
        elif choice < 0.08:
            del frames[index]
        elif choice < 0.12:
            frames.append(frames[index])
        elif choice < 0.16:
            other = generator.randrange(len(frames))
            frames[index], frames[other] = frames[other], frames[index]
        else:
            frames[index] = _mutate_frame(generator, frames[index])
    return frames


def _mutate_frame(generator: random.Random, frame: bytes) -> bytes:
    if not frame:
        return generator.randbytes(4)
    begin = generator.randrange(len(frame))
    end = min(len(frame), begin + generator.randint(1, 16))
    match generator.randrange(5):
        case 0:
            damaged = bytearray(frame)
            damaged[begin] ^= 1 << generator.randrange(8)
            return bytes(damaged)
        case 1:
            return frame[:begin] + frame[end:]
        case 2:
            return frame[:end] + frame[begin:]
        case 3:
            return frame[:begin] + generator.choice(_INTERESTING) + frame[begin + 1 :]
        case _:
            return frame[:begin] + generator.randbytes(end - begin) + frame[end:]


def fuzz_parsers(count: int, seed: int) -> Counter[str]:
    """Mutated messages through both decoders; counts what came out."""
    outcomes: Counter[str] = Counter()
    for decode, frames in _mutated(count, seed):
        try:
            outcomes[type(decode(frames)).__name__] += 1
        except BadMessage:
            outcomes["refused"] += 1
    return outcomes


def _mutated(count: int, seed: int) -> Iterator[tuple[Any, list[bytes]]]:
    generator = random.Random(seed)
    engines, learner = valid_from_engines(), valid_from_learner()
    for number in range(count):
        if number % 4:
            yield codec.decode_from_engine, mutate(generator, generator.choice(engines))
        else:
            yield codec.decode_from_learner, mutate(generator, generator.choice(learner))


class _SilentSocket:
    """A socket for handlers that are called directly: nothing is sent."""

    address, max_message_bytes, sends_lost, damaged, handshakes_failed = "nowhere", 1 << 20, 0, 0, 0

    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()

    def start(self, handler: Any) -> None: ...

    def send(self, *arguments: Any) -> bool:
        return True

    def waiting(self, peer: bytes) -> int:
        return 0

    def disconnect(self, peer: bytes) -> None: ...

    def reconnect(self) -> None: ...

    def key_of(self, peer: bytes) -> str:
        return ""

    def stop(self, linger_seconds: float) -> None: ...


def fuzz_handlers(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Mutated messages to the learner's and the engine's message handlers, each with a connection that stands."""
    generator = random.Random(seed)
    engines, learner = valid_from_engines(), valid_from_learner()
    hub = make_hub(folder / "journal", on_event=lambda line: None)
    hub._socket = hub._reception._socket = hub._reception._grants._socket = _SilentSocket()  # type: ignore[assignment]
    hub.restore(None)
    hub.publish(0)
    link = make_link("tcp://127.0.0.1:1", folder / "spool", on_event=lambda line: None)
    link._socket.stop(0.0)
    session = link._session
    link._socket = session._socket = link._outbox._socket = _SilentSocket()
    for number in range(count):
        if number % 8 == 0:
            hub._reception.on_message(b"peer", engines[0])
            session._failed, session.welcomed = False, True
        if number % 4:
            hub._reception.on_message(b"peer", mutate(generator, generator.choice(engines)))
        else:
            session.on_message(mutate(generator, generator.choice(learner)))
            link.poll(0)
            link.update((), GROUP, 0, 0, 0.0)
        if number % 1000 == 0:
            hub._reception.on_tick()
            hub.check()
    hub.check()
    refused = hub.stats().bad_messages
    hub._journal.close()
    link._spool.close()
    return {"messages": count, "refused_by_the_learner": refused}


def fuzz_socket(folder: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Garbage and mutated messages at the learner's open port while an honest engine works."""
    hub = make_hub(folder / "journal", on_event=lambda line: None, ledger={"max_staleness": 3})
    hub.restore(None)
    hub.start()
    hub.publish(0)
    engine = start_engine(hub.address, folder / "spool", sample_seconds=0.001)
    stopping, sent = threading.Event(), Counter[str]()
    attackers = [
        threading.Thread(target=attack, args=(hub.address, seed, stopping, sent), daemon=True)
        for attack in (_attack_with_messages, _attack_with_bytes)
    ]
    steps = 0
    try:
        batch = hub.take(BATCH // GROUP, ordered=False, timeout=20.0)
        assert batch is not None, "the honest engine did not come"
        hub.trained(batch)
        for attacker in attackers:
            attacker.start()
        deadline, before = time.monotonic() + seconds, 0
        while time.monotonic() < deadline:
            if steps == _SETTLED_STEPS:
                before = resident_bytes()
            batch = hub.take(BATCH // GROUP, ordered=False, timeout=20.0)
            if batch is None:
                raise RuntimeError(f"the honest engine's traffic stopped: {hub.stats()}")
            steps += 1
            hub.trained(batch)
            hub.publish(steps)
            hub.check()
        growth = resident_bytes() - before if before else 0
    finally:
        stopping.set()
        for attacker in attackers:
            attacker.join()
        stats = hub.stats()
        hub.stop()
        hub._journal.close()
        engine.kill()
        engine.communicate()
    counts = {
        "messages": sent["messages"], "connections": sent["connections"], "bad_messages": stats.bad_messages,
        "strangers": stats.strangers, "damaged_messages": stats.damaged_messages, "honest_steps": steps,
    }  # fmt: skip
    return {
        **counts, "cut_off": sent["cut_off"], "memory_growth_bytes": growth,
        "met": {name for name, count in counts.items() if count}, "expected": set(counts) - {"strangers"},
    }  # fmt: skip


def fuzz_engine_socket(folder: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Mutated messages from a learner that is none, at an engine's link over its own socket."""
    generator = random.Random(seed)
    valid = valid_from_learner()
    context = zmq.Context()
    learner = context.socket(zmq.ROUTER)
    learner.linger = 0
    port = learner.bind_to_random_port("tcp://127.0.0.1")
    link = make_link(f"tcp://127.0.0.1:{port}", folder / "spool", on_event=lambda line: None)
    link.start()
    sent, failures, before = 0, 0, 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if learner.poll(10):
            peer, *_ = learner.recv_multipart()
            for _ in range(20):
                frames = mutate(generator, generator.choice(valid))
                learner.send_multipart([peer, *(seal(frames) if generator.random() < 0.9 and frames else frames)])
                sent += 1
        failures += sum(isinstance(event, Failed) for event in link.poll(0))
        link.update((), GROUP, 0, 0, 0.0)
        link._session._failed = False  # one that has given up would not look at more
        link._outbox._failed = False
        before = before or (resident_bytes() if failures > _SETTLED_STEPS else 0)
    growth = resident_bytes() - before if before else 0
    counts = {"messages": sent, "failures": failures, "connections": link.connections}
    link.stop()
    learner.close()
    context.term()
    return {
        **counts, "damaged": link.stats().damaged_messages, "memory_growth_bytes": growth,
        "met": {name for name, count in counts.items() if count}, "expected": set(counts),
    }  # fmt: skip


def _attack_with_messages(address: str, seed: int, stopping: threading.Event, sent: Counter[str]) -> None:
    generator = random.Random(seed)
    engines = valid_from_engines()
    context = zmq.Context()
    while not stopping.is_set():
        peer = context.socket(zmq.DEALER)
        peer.linger = 0
        peer.connect(address)
        peer.send_multipart(seal(engines[0]))
        for _ in range(generator.randint(1, 30)):
            frames = mutate(generator, generator.choice(engines))
            peer.send_multipart(seal(frames) if generator.random() < 0.9 and frames else [*frames, b"crc?"])
            sent["messages"] += 1
        time.sleep(0.002)
        peer.close()
    context.term()


def _attack_with_bytes(address: str, seed: int, stopping: threading.Event, sent: Counter[str]) -> None:
    """Broken greetings, broken framing, connections left open."""
    generator = random.Random(seed + 1)
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)
    ready = b"\x04\x29\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
    open_ones: list[stdlib_socket.socket] = []
    while not stopping.is_set():
        try:
            connection = stdlib_socket.create_connection((host, int(port)), timeout=1.0)
            start = generator.choice([b"", greeting, greeting + ready, b"GET / HTTP/1.1\r\n\r\n"])
            huge = generator.choice([b"", b"\x02" + b"\xff" * 8, b"\x03" + bytes(7) + b"\xff"])
            connection.sendall(start + huge + generator.randbytes(generator.randrange(300)))
            sent["connections"] += 1
            if generator.random() < 0.1:
                open_ones.append(connection)
            else:
                connection.close()
        except OSError:
            sent["cut_off"] += 1
        if len(open_ones) > 50:
            open_ones.pop(0).close()
        time.sleep(0.002)
    for connection in open_ones:
        connection.close()


def fuzz(root: Path, *, count: int, seconds: float, seed: int) -> dict[str, Any]:
    """All of it; `count` mutated messages, three quarters through the parsers and one through the handlers."""
    problems: list[str] = []
    fuzz_parsers(2000, seed)  # caches fill
    fuzz_handlers(root / "warm", 2000, seed)
    before = resident_bytes()
    outcomes = fuzz_parsers(count * 3 // 4, seed + 1)
    handled = fuzz_handlers(root / "handlers", count // 4, seed + 2)
    growth = resident_bytes() - before
    if growth > GROWTH_LIMIT:
        problems.append(f"memory grew by {growth >> 20} MiB")
    if not outcomes["refused"] or len(outcomes) < 5:
        problems.append(f"the mutations do not reach the parsers: {outcomes}")
    at_socket = fuzz_socket(root / "socket", seconds, seed + 3)
    at_engine = fuzz_engine_socket(root / "engine", seconds / 2, seed + 4)
    for side, found in (("learner", at_socket), ("engine", at_engine)):
        if found["memory_growth_bytes"] > GROWTH_LIMIT:
            problems.append(f"memory of the {side} grew by {found['memory_growth_bytes'] >> 20} MiB under attack")
        problems += [f"the attack did not reach the {side}: no {name}" for name in found.pop("expected") - found["met"]]
        found["met"] = sorted(found["met"])
    return {
        "mutated": count, "outcomes": dict(outcomes), "handlers": handled, "memory_growth_bytes": growth,
        "socket": at_socket, "engine_socket": at_engine, "problems": problems,
    }  # fmt: skip
