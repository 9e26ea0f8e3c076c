"""The append-only log keeps what it was given, whatever happens to its files."""

import os
import resource
from pathlib import Path

import pytest

from pipeline.transport.segments import SegmentLog

PAYLOADS = [b"first", b"second record", b"third"]


def append(log: SegmentLog, payloads: list[bytes]) -> list[int]:
    """Each payload in two parts."""
    return log.append([(payload[:2], payload[2:]) for payload in payloads])


def contents(log: SegmentLog, start: int = 0) -> list[bytes]:
    return [payload for _, payload in log.records(start)]


def only_segment(folder: Path) -> Path:
    (path,) = folder.glob("*.log")
    return path


def test_records_survive_reopening_in_order(tmp_path):
    log = SegmentLog(tmp_path, segment_bytes=64)
    offsets = [offset for number in range(50) for offset in append(log, [b"%d" % number, b"x" * number])]
    log.close()
    again = SegmentLog(tmp_path, segment_bytes=64)
    assert [offset for offset, _ in again.records()] == offsets == sorted(set(offsets))
    assert contents(again) == [part for number in range(50) for part in (b"%d" % number, b"x" * number)]
    assert contents(again, offsets[60]) == contents(again)[60:]
    assert [again.read(offset) for offset in offsets] == contents(again)
    assert again.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) > 10


def test_torn_tail_is_cut_off_at_every_byte(tmp_path):
    log = SegmentLog(tmp_path)
    offsets = append(log, PAYLOADS)
    log.close()
    whole = only_segment(tmp_path).read_bytes()
    for length in range(offsets[2], len(whole)):
        only_segment(tmp_path).write_bytes(whole[:length])
        log = SegmentLog(tmp_path)
        assert contents(log) == PAYLOADS[:2], length
        assert log.torn_bytes == length - offsets[2]
        append(log, [b"after the crash"])
        assert contents(log) == [*PAYLOADS[:2], b"after the crash"]
        assert log.corrupt == 0
        log.close()


@pytest.mark.parametrize("tail", [b"\0" * 100, b"\x93RLg" * 9, b"\x93RLg\xff\xff\xff\xff1234rest"])
def test_rubbish_after_the_last_record_is_cut_off(tmp_path, tail):
    log = SegmentLog(tmp_path)
    append(log, PAYLOADS)
    log.close()
    with only_segment(tmp_path).open("ab") as file:
        file.write(tail)
    log = SegmentLog(tmp_path)
    assert contents(log) == PAYLOADS
    assert log.torn_bytes == len(tail)


def test_damage_in_the_middle_loses_that_record_alone(tmp_path):
    log = SegmentLog(tmp_path)
    offsets = append(log, PAYLOADS)
    log.close()
    whole = only_segment(tmp_path).read_bytes()
    for position in range(offsets[1], offsets[2]):
        damaged = bytearray(whole)
        damaged[position] ^= 0x5A
        only_segment(tmp_path).write_bytes(damaged)
        log = SegmentLog(tmp_path)
        assert contents(log) == [PAYLOADS[0], PAYLOADS[2]], position
        assert log.corrupt == 1
        with pytest.raises(OSError, match="damaged"):
            log.read(offsets[1])
        log.close()


def test_record_inside_a_payload_does_not_pass_for_one(tmp_path):
    inner = SegmentLog(tmp_path / "inner")
    append(inner, [b"inner"])
    inner.close()
    copied = only_segment(tmp_path / "inner").read_bytes()
    log = SegmentLog(tmp_path / "outer")
    offset, _ = append(log, [copied + b"end", b"next"])
    log.close()
    path = only_segment(tmp_path / "outer")
    damaged = bytearray(path.read_bytes())
    damaged[offset + 8] ^= 1  # the outer record's checksum
    path.write_bytes(damaged)
    assert contents(SegmentLog(tmp_path / "outer")) == [b"next"]


def test_dropping_deletes_whole_segments_and_keeps_offsets(tmp_path):
    log = SegmentLog(tmp_path, segment_bytes=100)
    offsets = [append(log, [b"x" * 40])[0] for _ in range(20)]
    before = log.size
    log.drop_before(offsets[11])
    assert log.size < before
    kept = [offset for offset, _ in log.records()]
    assert kept == offsets[-len(kept) :] and set(offsets[11:]) <= set(kept)
    log.drop_before(log.end)
    assert log.size == 0 and contents(log) == []
    end = log.end
    log.close()
    again = SegmentLog(tmp_path, segment_bytes=100)
    assert append(again, [b"later"]) == [end]


def test_failed_write_leaves_the_log_as_it_was(tmp_path):
    log = SegmentLog(tmp_path)
    append(log, PAYLOADS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.size + 20, hard))  # lets a part of the next record through
    try:
        with pytest.raises(OSError, match="too large"):
            append(log, [b"y" * 1000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(log) == PAYLOADS and log.size == only_segment(tmp_path).stat().st_size
    append(log, [b"there is room again"])
    log.close()
    again = SegmentLog(tmp_path)
    assert contents(again) == [*PAYLOADS, b"there is room again"] and again.corrupt == 0


def test_more_parts_than_one_system_call_takes_are_written(tmp_path):
    log = SegmentLog(tmp_path)
    offsets = log.append([[b"%d," % part for part in range(number, number + 5)] for number in range(1000)])
    log.close()
    again = SegmentLog(tmp_path)
    assert [payload for _, payload in again.records()] == [
        b"".join(b"%d," % part for part in range(number, number + 5)) for number in range(1000)
    ]
    assert again.read(offsets[700]) == b"700,701,702,703,704,"


def test_a_write_that_takes_only_a_part_goes_on_where_it_stopped(tmp_path, monkeypatch):
    write = os.writev
    monkeypatch.setattr(os, "writev", lambda descriptor, parts: write(descriptor, [b"".join(parts)[:7]]))
    log = SegmentLog(tmp_path)
    append(log, PAYLOADS)
    assert contents(log) == PAYLOADS


@pytest.mark.parametrize("fsync", [True, False])
def test_nothing_is_synced_where_that_was_not_asked_for(tmp_path, monkeypatch, fsync):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    log = SegmentLog(tmp_path, segment_bytes=20, fsync=fsync)
    for payload in PAYLOADS:
        append(log, [payload])
    log.close()
    assert bool(synced) == fsync
