"""Weights over the connection: whole, checked, gone on with after an interruption, and nothing but weights."""

import random
import shutil
import threading
import time
from collections import Counter
from queue import Queue
from types import SimpleNamespace

import msgspec
import pytest

from pipeline.config import load_config
from pipeline.engine.service import Engine
from pipeline.messages import LARGEST_CHUNK, BadMessage, WeightsChunk, WeightsFile, WeightsFiles, WeightsRequest
from pipeline.weights import StreamFollower, WeightsPending, WeightsServer
from pipeline.weights.base import Publication
from pipeline.weights.filesystem import sha256_of


def publish(root, version: int, size: int = 3 * LARGEST_CHUNK + 17) -> bytes:
    folder = root / f"v{version}"
    folder.mkdir(parents=True)
    data = random.Random(version).randbytes(size)
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text("{}")
    (folder / "empty").write_text("")
    digest = sha256_of(folder / "model.safetensors")
    publication = Publication(version=version, timeline=1, step=version, sha256=digest, bytes=size)
    (folder / "publication.json").write_bytes(msgspec.json.encode(publication))
    return data


class Wire:
    """Connects a follower to a server; `alter` may change or swallow an answer."""

    def __init__(self, root, local) -> None:
        self.server = WeightsServer(root)
        self.up = True
        self.pieces = []
        self.events = []
        self.alter = lambda message: message
        self.connections = 1
        self.follower = StreamFollower(local, self._request, self.events.append, lambda: self.connections)
        self.server.start(self._answer, lambda peer: 0)

    def _request(self, request: WeightsRequest) -> bool:
        if self.up:
            self.server.request(b"peer", request)
        return self.up

    def _answer(self, peer: bytes, message) -> None:
        if isinstance(message, WeightsChunk):
            self.pieces.append((message.file, message.offset))
        if (altered := self.alter(message)) is not None and self.up:
            self.follower.receive(altered)

    def fetch(self, version: int, seconds: float = 10.0):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                return self.follower.fetch(version)
            except WeightsPending:
                time.sleep(0.01)
        raise AssertionError("it did not come in time")

    def close(self) -> None:
        self.follower.close()
        self.server.stop()


@pytest.fixture
def wire(tmp_path):
    wire = Wire(tmp_path / "weights", tmp_path / "local")
    yield wire
    wire.close()


def test_a_version_arrives_whole(tmp_path, wire):
    data = publish(tmp_path / "weights", 4)
    folder, publication = wire.fetch(4)
    assert publication.version == 4 and folder == tmp_path / "local" / "v4"
    assert (folder / "model.safetensors").read_bytes() == data
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "publication.json", "empty"}
    assert wire.fetch(3)[1].version == 4, "a newer one is as good"


def test_an_interrupted_version_is_gone_on_with_also_by_the_next_process(tmp_path, wire):
    data = publish(tmp_path / "weights", 1, 6 * LARGEST_CHUNK)

    def cut(message):
        wire.up = not (isinstance(message, WeightsChunk) and message.offset >= 2 * LARGEST_CHUNK)
        return message

    wire.alter = cut
    with pytest.raises(AssertionError):
        wire.fetch(1, 0.5)
    assert not list((tmp_path / "local").glob("v*")), "a part is no version"
    wire.follower.close()
    again = Wire(tmp_path / "weights", tmp_path / "local")
    assert (again.fetch(1)[0] / "model.safetensors").read_bytes() == data
    asked = {offset for name, offset in again.pieces if name == "model.safetensors"}
    assert min(asked) == 2 * LARGEST_CHUNK, "what had arrived is not asked for again"
    again.close()


def test_weights_of_another_run_are_not_taken_for_this_one_s(tmp_path):
    publish(tmp_path / "one", 5)
    local = tmp_path / "local"
    for run, again in (("a", False), ("a", True)):
        wire = Wire(tmp_path / "one", local)
        wire.follower.bind(run)
        assert wire.fetch(5)[1].version == 5 and bool(wire.pieces) != again, "what is here is not asked for again"
        wire.close()
    (local / ".receiving-7").mkdir()
    data = publish(tmp_path / "another", 1)
    wire = Wire(tmp_path / "another", local)
    wire.follower.bind("b")
    assert wire.follower.newest() == -1 and not list(local.glob(".receiving-*"))
    folder, publication = wire.fetch(1)
    assert publication.version == 1 and (folder / "model.safetensors").read_bytes() == data
    wire.close()


def test_an_engine_loads_no_weights_of_the_run_before(tmp_path):
    publish(tmp_path / "local", 5)
    wire = Wire(tmp_path / "weights", tmp_path / "local")
    wire.follower.bind("a")
    publish(tmp_path / "local", 5)
    link, observer = SimpleNamespace(run="b"), SimpleNamespace(enter=lambda state: None)
    config = load_config(None, ["weights.transport=stream"])
    engine = Engine(config, link, wire.follower, [], None, wire.events.append, lambda: None, observer)
    engine.wanted_version = 1
    engine._follow_weights()
    assert engine.generator is None and wire.follower.newest() == -1
    wire.close()


def test_lost_answers_are_asked_for_again(tmp_path, wire, monkeypatch):
    monkeypatch.setattr("pipeline.weights.stream._ANSWER_SECONDS", 0.1)
    data = publish(tmp_path / "weights", 1)
    generator = random.Random(0)
    wire.alter = lambda message: message if generator.random() < 0.6 else None
    assert (wire.fetch(1)[0] / "model.safetensors").read_bytes() == data


def test_a_damaged_file_is_refused_and_asked_for_again(tmp_path, wire):
    data = publish(tmp_path / "weights", 1)
    damaged = []

    def damage_once(message):
        if isinstance(message, WeightsChunk) and message.file == "model.safetensors" and not damaged:
            damaged.append(message.offset)
            return msgspec.structs.replace(message, data=bytes([message.data[0] ^ 1]) + message.data[1:])
        return message

    wire.alter = damage_once
    assert (wire.fetch(1)[0] / "model.safetensors").read_bytes() == data
    assert damaged and any("damaged" in line for line in wire.events)


def test_a_version_that_is_gone_gives_way_to_the_next(tmp_path, wire):
    with pytest.raises(AssertionError):
        wire.fetch(1, 0.3)
    publish(tmp_path / "weights", 2)
    assert wire.fetch(2)[1].version == 2


def test_only_the_newest_two_stay(tmp_path, wire):
    for version in range(4):
        publish(tmp_path / "weights", version, 100)
        wire.fetch(version)
    deadline = time.monotonic() + 5.0
    while sorted(path.name for path in (tmp_path / "local").iterdir()) != ["v2", "v3"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["../v1/config.json", "/etc/passwd", "..", "missing", "a/b"])
def test_no_request_leads_out_of_the_folder(tmp_path, name):
    publish(tmp_path / "weights", 1)
    (tmp_path / "weights" / "v1" / "..hidden").write_text("x")
    server = WeightsServer(tmp_path / "weights")
    answer = server._answer(WeightsRequest(version=1, file=name))
    assert answer.data == b""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"name": name if "/" in name or "." in name else "../x", "bytes": 1, "sha256": ""}, WeightsFile)


def test_lists_of_versions_that_are_gone_are_not_kept(tmp_path):
    server = WeightsServer(tmp_path)
    for version in range(9):
        publish(tmp_path, version, 10)
        assert len(server._answer(WeightsRequest(version=version)).files) == 4
        if version >= 2:
            shutil.rmtree(tmp_path / f"v{version - 2}")
    assert server._lists.keys() == {6, 7, 8}
    assert server._answer(WeightsRequest(version=6)).files == () and server._lists.keys() == {7, 8}


def test_an_engine_that_asks_without_end_is_told_off(tmp_path):
    server = WeightsServer(tmp_path)
    with pytest.raises(BadMessage, match="requests for weights"):
        for offset in range(100):
            server.request(b"peer", WeightsRequest(version=1, offset=offset))


def test_a_peer_that_takes_nothing_is_not_answered_and_others_are(tmp_path):
    publish(tmp_path / "weights", 1, 40 * LARGEST_CHUNK)
    server = WeightsServer(tmp_path / "weights")
    queued = Counter()

    def send(peer, message):
        queued[peer] += len(message.data)

    server.start(send, lambda peer: queued[peer] if peer == b"deaf" else 0)
    for index in range(40):
        for peer in (b"deaf", b"peer"):
            server.request(peer, WeightsRequest(version=1, file="model.safetensors", offset=index * LARGEST_CHUNK))
    deadline = time.monotonic() + 10.0
    while queued[b"peer"] < 40 * LARGEST_CHUNK:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert 0 < queued[b"deaf"] < 20 * LARGEST_CHUNK
    with pytest.raises(BadMessage, match="requests for weights"):
        for offset in range(64):
            server.request(b"deaf", WeightsRequest(version=1, offset=offset))
    server.stop()


def test_on_a_slow_connection_pieces_under_way_are_not_asked_for_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.weights.stream._ANSWER_SECONDS", 0.05)
    pieces = 30
    data = publish(tmp_path / "weights", 1, pieces * LARGEST_CHUNK)
    line = Queue()
    wire = Wire(tmp_path / "weights", tmp_path / "local")
    wire.alter = line.put  # in order, and none of them lost

    def deliver():
        while (message := line.get()) is not None:
            time.sleep(0.1)  # each takes twice as long as what is asked for is waited for
            wire.follower.receive(message)

    thread = threading.Thread(target=deliver)
    thread.start()
    assert (wire.fetch(1, 30.0)[0] / "model.safetensors").read_bytes() == data
    line.put(None)
    thread.join()
    wire.close()
    assert len(wire.pieces) < 2 * pieces


def test_what_was_asked_on_a_connection_that_ended_is_asked_for_at_once_on_the_next(tmp_path):
    data = publish(tmp_path / "weights", 1)
    wire = Wire(tmp_path / "weights", tmp_path / "local")
    wire.alter = lambda message: None
    with pytest.raises(AssertionError):
        wire.fetch(1, 0.3)
    wire.alter = lambda message: message
    wire.connections += 1
    assert (wire.fetch(1, 2.0)[0] / "model.safetensors").read_bytes() == data
    wire.close()


def test_an_answer_nobody_asked_for_changes_nothing(tmp_path, wire):
    wire.follower.receive(WeightsFiles(version=9, files=()))
    wire.follower.receive(WeightsChunk(version=9, file="x", offset=0, data=b"x"))
    time.sleep(0.1)
    assert list((tmp_path / "local").iterdir()) == []
