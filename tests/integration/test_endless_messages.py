"""A message whose frames never end is cut off by the bytes of its connection, and costs nobody else anything."""

import socket
import struct
import sys
import time

import pytest

from benchmarks.results import resident_bytes
from benchmarks.synthetic import start_engine
from pipeline import codec, messages
from pipeline.transport.integrity import seal
from tests.integration.running import answer, eventually, hello, raw_peer, running, running_hub, train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the bytes of a connection")
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
MORE = b"\x01\x00"  # an empty frame that is not the last


def connect(address: str) -> socket.socket:
    """A plain socket that has shaken hands as ZeroMQ does."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    peer = socket.create_connection((host, int(port)), timeout=5.0)
    peer.sendall(GREETING + b"\x04" + struct.pack("B", len(READY)) + READY)
    said = b""
    while b"READY" not in said:  # what comes earlier would be taken for a part of the handshake
        said += peer.recv(1000)
    return peer


@pytest.mark.parametrize("has_said_hello", [False, True])
def test_a_message_without_end_ends_its_connection(tmp_path, has_said_hello):
    with running_hub(tmp_path, sockets={"max_message_bytes": 1 << 20}) as hub:
        engine = start_engine(hub.address, tmp_path / "spool")
        with running(engine):
            train(hub, 1, [])
            before = resident_bytes()
            peer = connect(hub.address)
            if has_said_hello:
                frames = codec.encode(messages.Leaving(handed_back=()))
                for frame in (sealed := seal(frames)):
                    peer.sendall(bytes([frame is not sealed[-1], len(frame)]) + frame)
            with pytest.raises((BrokenPipeError, ConnectionResetError, TimeoutError)):  # it can also find no taker
                deadline = time.monotonic() + 30.0
                while time.monotonic() < deadline:
                    peer.sendall(MORE * 10_000)
                    time.sleep(0.001)
            assert resident_bytes() - before < 600 << 20
            eventually(lambda: hub.stats().refused_connections.get("endless_message") == 1)
            train(hub, 2, [])  # the others go on
            peer.close()


def test_a_bad_peer_that_is_forgotten_is_cut_off_rather_than_listened_to(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.transport.router._REMEMBERED_PEERS", 1)
    with running_hub(tmp_path, sockets={"heartbeat_seconds": 60.0}) as hub:
        peers = []
        for count in (1, 2):
            peers.append(connect(hub.address))
            peers[-1].sendall(b"\x00\x03bad")  # one frame without a checksum
            eventually(lambda count=count: hub.stats().damaged_messages == count)
        while peers[0].recv(1000):
            pass  # what it was told before, then the end
        peers[1].settimeout(0.3)
        with pytest.raises(TimeoutError):
            while peers[1].recv(1000):
                pass
        for peer in peers:
            peer.close()


def test_a_peer_that_speaks_the_first_protocol_of_zeromq_does_no_harm(tmp_path):
    with running_hub(tmp_path) as hub:
        host, _, port = hub.address.removeprefix("tcp://").rpartition(":")
        with socket.create_connection((host, int(port)), timeout=20.0) as peer:
            peer.sendall(b"\x01\x00" + b"\x04\x00bad")  # no identity, and a frame of three bytes
            eventually(lambda: hub.stats().damaged_messages == 1)
        assert hub.take(1, ordered=False, timeout=0.1) is None, "the socket works still"


def test_large_messages_that_end_are_no_offence(tmp_path):
    with running_hub(tmp_path, sockets={"max_message_bytes": 1 << 20}, lease_seconds=30.0) as hub:
        peer = raw_peer(hub.address)
        hello(peer, "peer")
        assert isinstance(answer(peer), messages.Welcome)
        failed = codec.encode(messages.fatal("x", "y" * 60_000))
        for _ in range(300):
            peer.send_multipart([b"?" * (1 << 20), *seal(failed)])  # nothing that is listened to
        time.sleep(2.0)
        assert "endless_message" not in hub.stats().refused_connections
        peer.close(linger=0)
