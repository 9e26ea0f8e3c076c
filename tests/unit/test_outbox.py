"""From the queue to the socket: nothing unspooled is sent, nothing waits that should not, and all of it is bounded."""

import shutil
import time
from collections.abc import Iterator

import pytest

from pipeline.engine.outbox import Outbox
from pipeline.failpoints import arm
from pipeline.transport.spool import Spool


class FakeSocket:
    """Takes what it is given and remembers it; the learner's answers are the test's."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, frames) -> bool:
        self.sent.append(frames[0])
        return True


def eventually(condition) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def make(tmp_path) -> Iterator:
    made = []

    def make_outbox(limit: int = 1 << 20) -> tuple[Outbox, FakeSocket, Spool, list[str]]:
        socket, lines = FakeSocket(), []
        spool = Spool.acquire(tmp_path, limit)
        outbox = Outbox(socket, spool, lines.append, lines.append)
        outbox.start()
        made.append((outbox, spool))
        return outbox, socket, spool, lines

    yield make_outbox
    arm("")
    for outbox, spool in made:
        outbox.stop()
        spool.close()


def test_the_window_bounds_what_is_sent_and_not_committed_in_samples_and_bytes(make):
    outbox, socket, _, _ = make()
    outbox.set_window(4, 1 << 20)
    outbox.connected([])
    for sample in range(20):
        outbox.put(((0, sample), [b"x" * 1000]))
    eventually(lambda: len(socket.sent) == 4)
    outbox.set_window(100, 6500)
    eventually(lambda: len(socket.sent) == 7)
    time.sleep(0.05)
    assert len(socket.sent) == 7 and outbox.stats().sent_bytes == 7000
    outbox.committed([(0, sample) for sample in range(3)])
    eventually(lambda: len(socket.sent) == 10)
    outbox.set_window(100, 0)
    outbox.committed([(0, sample) for sample in range(3, 10)])
    eventually(lambda: len(socket.sent) == 11)
    time.sleep(0.05)
    assert len(socket.sent) == 11, "one always may"


def test_what_was_received_and_is_not_committed_fills_the_window_after_a_reconnection_too(make):
    outbox, socket, _, _ = make()
    outbox.set_window(100, 3500)
    outbox.connected([])
    for sample in range(12):
        outbox.put(((0, sample), [b"x" * 900, b"y" * 100]))
    received = [(0, sample) for sample in range(4)]
    eventually(lambda: len(socket.sent) == 4)
    for _ in range(3):
        outbox.connected(received)
        time.sleep(0.05)
        assert len(socket.sent) == 4 and outbox.stats().sent_bytes == 4000
    outbox.committed(received)
    eventually(lambda: len(socket.sent) == 8)
    time.sleep(0.05)
    assert len(socket.sent) == 8 and outbox.stats().sent_bytes == 4000


def test_putting_never_waits_and_a_full_spool_says_so(make):
    outbox, _, spool, _ = make(limit=20_000)
    began = time.monotonic()
    for sample in range(1000):
        outbox.put(((0, sample), [b"x" * 500]))
    assert time.monotonic() - began < 0.5
    eventually(lambda: spool.full)
    assert not outbox.has_room
    assert 20_000 <= spool.size < 20_600, "the sample that fills it is the last"
    time.sleep(0.1)
    assert outbox.stats().blocked_seconds >= 0.1
    outbox.connected([])
    for _ in range(200):
        outbox.committed(spool.pending())
        if not len(spool) and not outbox.stats().queued:
            break
        time.sleep(0.02)
    eventually(lambda: outbox.has_room)
    assert spool.size < 20_000


def test_samples_are_sent_from_memory_and_from_disk_after_a_reconnection(make):
    outbox, socket, spool, _ = make()
    outbox.connected([])
    outbox.put(((0, 0), [b"a"]))
    outbox.put(((0, 1), [b"b"]))
    eventually(lambda: socket.sent == [b"a", b"b"])
    outbox.disconnected()
    outbox.connected([(0, 1)])
    eventually(lambda: socket.sent == [b"a", b"b", b"a"])
    outbox.committed([(0, 0), (0, 1)])
    assert outbox.wait_until_empty(1.0) and len(spool) == 0


def test_a_spool_whose_samples_are_all_committed_is_empty_for_the_next_engine_too(make, tmp_path):
    outbox, socket, spool, _ = make()
    outbox.connected([])
    for number in range(2):
        outbox.put(*(((number, sample), [b"x" * 100]) for sample in range(3)))
        eventually(lambda sent=3 * (number + 1): len(socket.sent) == sent)
        outbox.committed([(number, sample) for sample in range(2)])
        time.sleep(0.02)
        assert spool.size > 0
        outbox.committed([(number, 2)])
        eventually(lambda: spool.size == 0)
        killed = tmp_path / f"killed-{number}"
        shutil.copytree(spool.folder, killed / spool.producer)
        left = Spool.acquire(killed, 1 << 20)
        assert left.pending() == [] and left.corrupt == 0
        left.close()


def test_a_disk_that_is_full_is_waited_for(make):
    outbox, socket, _, lines = make()
    arm("spool.write=enospc*2")
    outbox.connected([])
    outbox.put(((0, 0), [b"a"]))
    eventually(lambda: not outbox.has_room)
    assert socket.sent == [], "nothing is sent that is not on disk"
    eventually(lambda: socket.sent == [b"a"])
    assert outbox.has_room
    assert "no space" in lines[0] and "space" in lines[1] and "again" in lines[1]


def test_a_disk_that_fails_ends_the_link(make):
    outbox, socket, _, lines = make()
    arm("spool.fsync=error*1")
    outbox.connected([])
    outbox.put(((0, 0), [b"a"]))
    eventually(lambda: lines)
    assert "cannot be written" in lines[0] and socket.sent == []


def test_a_damaged_record_is_skipped_and_counted(make):
    outbox, socket, spool, _ = make()
    for sample in range(3):
        outbox.put(((0, sample), [b"%d" % sample * 100]))
    eventually(lambda: len(spool) == 3)
    outbox._kept.clear()
    (path,) = (spool.folder / "log").glob("*.log")
    data = bytearray(path.read_bytes())
    data[data.index(b"1" * 100)] ^= 1
    path.write_bytes(data)
    outbox.connected([])
    eventually(lambda: len(socket.sent) == 2)
    assert [frame[:1] for frame in socket.sent] == [b"0", b"2"]
    assert spool.corrupt == 1 and (0, 1) not in spool.pending()


def test_a_sample_without_an_answer_is_overdue(make):
    outbox, socket, _, _ = make()
    outbox.connected([])
    assert not outbox.overdue(0.0)
    outbox.put(((0, 0), [b"a"]))
    eventually(lambda: socket.sent)
    time.sleep(0.02)
    assert outbox.overdue(0.01) and not outbox.overdue(60.0)
    outbox.committed([(0, 0)])
    assert not outbox.overdue(0.0)
