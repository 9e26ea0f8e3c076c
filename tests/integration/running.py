"""Starting, feeding and waiting for hubs, links and engine processes."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

from benchmarks.synthetic import BATCH, DIGEST, GROUP, make_hub
from learner.hub import Hub
from pipeline import codec, messages
from pipeline.engine.link import Failed, Link
from pipeline.messages import SCHEMA, Capabilities
from pipeline.transport.integrity import seal, unseal

GROUPS = BATCH // GROUP


@contextmanager
def running_hub(folder: Path, **options) -> Iterator[Hub]:
    hub = make_hub(folder / "journal", **options)
    hub.restore(None)
    hub.start()
    hub.publish(0)
    try:
        yield hub
    finally:
        hub.stop()
        hub._journal.close()


@contextmanager
def running(*processes: subprocess.Popen) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                stream.close()


def train(hub: Hub, steps: int, trained: list, timeout: float = 15.0) -> None:
    for _ in range(steps):
        batch = hub.take(GROUPS, ordered=False, timeout=timeout)
        assert batch is not None, hub.stats()
        trained += [sample.id for group in batch.groups for sample in group.trajectories]
        hub.trained(batch)
        hub.publish(hub.stats().step)


def eventually(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ended(engine: subprocess.Popen) -> str:
    output, errors = engine.communicate(timeout=10)
    assert output, errors
    return json.loads(output)["ended"]


def wait_for(link: Link, kind: type, seconds: float = 10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for event in link.poll(0.1):
            if isinstance(event, kind):
                return event
            assert not isinstance(event, Failed), event
    raise AssertionError(f"no {kind.__name__} in time")


def wait_for_failure(link: Link) -> Failed:
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        for event in link.poll(0.1):
            if isinstance(event, Failed):
                return event
    raise AssertionError("the link did not fail")


def raw_peer(address: str) -> zmq.Socket:
    peer = zmq.Context.instance().socket(zmq.DEALER)
    peer.setsockopt(zmq.RCVTIMEO, 5000)
    peer.connect(address)
    return peer


def send(peer: zmq.Socket, frames: list[bytes]) -> None:
    peer.send_multipart(seal(frames))


def hello(peer: zmq.Socket, producer: str, incarnation: int = 0, **fields) -> None:
    message = messages.Hello(
        schema=SCHEMA, producer=producer, incarnation=incarnation, digest=DIGEST,
        capabilities=Capabilities(entropy=True), **fields,
    )  # fmt: skip
    send(peer, codec.encode(message))


def answer(peer: zmq.Socket, *skipped: type):
    while True:
        frames = unseal(peer.recv_multipart())
        assert frames is not None
        message = codec.decode_from_learner(frames)
        if not isinstance(message, skipped):
            return message
