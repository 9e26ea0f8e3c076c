"""What is queued for a peer that does not read is bounded in bytes, and nobody else waits for it."""

import os
import time

import pytest
import zmq

from benchmarks.results import resident_bytes
from pipeline import codec, messages
from pipeline.messages import LARGEST_CHUNK, WeightsRequest
from pipeline.transport.options import HIGH_WATER_MARK
from pipeline.weights import WeightsServer
from tests.integration.running import eventually, hello, running_hub, send

FILE = "model.safetensors"


@pytest.fixture
def deaf():
    """A peer that never reads, and whose connection holds little."""
    peer = zmq.Context.instance().socket(zmq.DEALER)
    peer.rcvhwm = 1
    peer.setsockopt(zmq.RCVBUF, 4096)
    yield peer
    peer.close(linger=0)


def test_a_peer_that_asks_for_weights_and_does_not_read_is_told_off_before_memory_grows(tmp_path, deaf):
    pieces = 200
    folder = tmp_path / "weights" / "v0"
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(os.urandom(pieces * LARGEST_CHUNK))
    with running_hub(tmp_path, weights=WeightsServer(tmp_path / "weights"), lease_seconds=30.0) as hub:
        deaf.connect(hub.address)
        hello(deaf, "deaf")
        eventually(lambda: hub.stats().engines == 1)
        before = resident_bytes()
        for piece in range(pieces):
            request = WeightsRequest(version=0, file=FILE, offset=piece * LARGEST_CHUNK)
            send(deaf, codec.encode(request))
            time.sleep(0.005)
        eventually(lambda: hub.stats().bad_messages == 1)
        # what ZeroMQ and the kernel take, and what the server lets wait
        assert resident_bytes() - before < (HIGH_WATER_MARK + 80) * LARGEST_CHUNK


def test_a_peer_is_given_up_by_the_bytes_that_wait_for_it(tmp_path, deaf, monkeypatch):
    monkeypatch.setattr("pipeline.transport.router.BACKLOG_BYTES", 1 << 20)
    with running_hub(tmp_path, lease_seconds=30.0, sockets={"max_message_bytes": 1 << 20}) as hub:
        deaf.connect(hub.address)
        hello(deaf, "deaf")
        eventually(lambda: hub.stats().engines == 1)
        (peer,) = (engine.peer for engine in hub._reception.roster)
        large = codec.encode(messages.fatal("x" * 60_000))
        for _ in range(HIGH_WATER_MARK + 400):
            hub._socket.send(peer, large)
            time.sleep(0.002)
        eventually(lambda: hub.stats().engines == 0)
        assert hub.stats().sends_lost > 0
