"""The journal acknowledges what is on disk and nothing else."""

import resource
import threading

import pytest

from learner.journal import Arrived, Dropped, Failed, Granted, Journal
from pipeline.errors import RunFailed, UsageError
from pipeline.failpoints import arm
from pipeline.transport.segments import SegmentLog

RECORDS = [
    Granted(0, 0, 3, "producer"),
    Arrived(0, 0, [b"header", b"", b"body"]),
    Failed(0, 1, "reward_error", "no answer"),
    Dropped(0, "stale"),
]


def test_records_are_replayed_in_order_from_any_offset(tmp_path):
    journal = Journal(tmp_path, segment_bytes=128)
    positions = []
    for record in RECORDS * 20:
        positions.append(journal.position)
        journal.append(record)
    journal.close()
    again = Journal(tmp_path)
    replayed = list(again.replay())
    assert [record for _, record in replayed] == RECORDS * 20
    offsets = [offset for offset, _ in replayed]
    assert all(position <= offset for position, offset in zip(positions, offsets, strict=True))
    assert [record for _, record in again.replay(offsets[31])] == (RECORDS * 20)[31:]
    again.close()


def test_callback_comes_after_the_record_is_on_disk(tmp_path):
    journal = Journal(tmp_path)
    found = []
    done = threading.Event()

    def durable():
        found.extend(record for _, record in journal.replay())
        done.set()

    journal.append(RECORDS[1], durable)
    assert done.wait(5) and RECORDS[1] in found
    journal.close()


def test_dropped_records_give_their_space_back(tmp_path):
    for _ in range(20):  # each writer's batch goes into one segment
        journal = Journal(tmp_path, segment_bytes=256)
        for record in RECORDS * 3:
            journal.append(record)
        journal.close()
    journal = Journal(tmp_path, segment_bytes=256)
    before = journal.size
    last = [offset for offset, _ in journal.replay()][-1]
    journal.drop_before(last)
    journal.close()
    assert journal.size < before / 4
    again = Journal(tmp_path)
    assert [record for _, record in again.replay()][-1] == RECORDS[-1]
    again.close()


def test_full_disk_stops_acknowledging_and_is_reported(tmp_path):
    journal = Journal(tmp_path)
    acknowledged, errors = [], []
    failed = threading.Event()
    journal.on_error = lambda error: (errors.append(error), failed.set())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        journal.append(Arrived(0, 0, [b"x" * 10_000]), lambda: acknowledged.append(0))
        assert failed.wait(5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.append(RECORDS[1], lambda: acknowledged.append(1))
    journal.close()
    assert acknowledged == [] and errors == [journal.error]
    again = Journal(tmp_path)
    assert list(again.replay()) == []
    again.close()


def test_unwritable_place_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"choose another run\.out"):
        Journal(tmp_path / "file")


def test_disk_without_space_is_waited_for_and_nothing_is_acknowledged_before(tmp_path):
    journal = Journal(tmp_path)
    states, done = [], threading.Event()
    journal.on_stall = states.append
    arm("journal.write=enospc*2")
    try:
        journal.append(RECORDS[1], done.set)
        assert not done.wait(0.5) and journal.stalled
        assert done.wait(5)
    finally:
        arm("")
    assert states == [True, False] and journal.error is None
    assert [record for _, record in journal.replay()] == [RECORDS[1]]
    journal.close()


def test_closing_does_not_wait_for_space(tmp_path):
    journal = Journal(tmp_path)
    acknowledged = []
    arm("journal.write=enospc")
    try:
        journal.append(RECORDS[1], lambda: acknowledged.append(1))
        journal.close()
    finally:
        arm("")
    assert acknowledged == []


@pytest.mark.parametrize("payload", [b"\x94\xa1a\0\0\x90", b"\1\0\0\0\3\0\0\0abc", b"\0\0\0\0", b""])
def test_a_journal_of_another_version_is_refused_with_its_folder(tmp_path, payload):
    log = SegmentLog(tmp_path)
    log.append([[payload]])
    log.close()
    journal = Journal(tmp_path)
    with pytest.raises(RunFailed, match="written by another version"):
        list(journal.replay())
    journal.close()
