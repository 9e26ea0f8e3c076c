"""The append-only log keeps what it was given, whatever happens to its files."""

import resource
from pathlib import Path

import pytest

from pipeline.transport.segments import SegmentLog

PAYLOADS = [b"first", b"second record", b"third"]


def contents(log: SegmentLog, start: int = 0) -> list[bytes]:
    return [payload for _, payload in log.records(start)]


def only_segment(folder: Path) -> Path:
    (path,) = folder.glob("*.log")
    return path


def test_records_survive_reopening_in_order(tmp_path):
    log = SegmentLog(tmp_path, segment_bytes=64)
    offsets = [offset for number in range(50) for offset in log.append([b"%d" % number, b"x" * number])]
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
    offsets = log.append(PAYLOADS)
    log.close()
    whole = only_segment(tmp_path).read_bytes()
    for length in range(offsets[2], len(whole)):
        only_segment(tmp_path).write_bytes(whole[:length])
        log = SegmentLog(tmp_path)
        assert contents(log) == PAYLOADS[:2], length
        assert log.torn_bytes == length - offsets[2]
        log.append([b"after the crash"])
        assert contents(log) == [*PAYLOADS[:2], b"after the crash"]
        assert log.corrupt == 0
        log.close()


@pytest.mark.parametrize("tail", [b"\0" * 100, b"\x93RLg" * 9, b"\x93RLg\xff\xff\xff\xff1234rest"])
def test_rubbish_after_the_last_record_is_cut_off(tmp_path, tail):
    log = SegmentLog(tmp_path)
    log.append(PAYLOADS)
    log.close()
    with only_segment(tmp_path).open("ab") as file:
        file.write(tail)
    log = SegmentLog(tmp_path)
    assert contents(log) == PAYLOADS
    assert log.torn_bytes == len(tail)


def test_damage_in_the_middle_loses_that_record_alone(tmp_path):
    log = SegmentLog(tmp_path)
    offsets = log.append(PAYLOADS)
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
    inner.append([b"inner"])
    inner.close()
    copied = only_segment(tmp_path / "inner").read_bytes()
    log = SegmentLog(tmp_path / "outer")
    offset, _ = log.append([copied + b"end", b"next"])
    log.close()
    path = only_segment(tmp_path / "outer")
    damaged = bytearray(path.read_bytes())
    damaged[offset + 8] ^= 1  # the outer record's checksum
    path.write_bytes(damaged)
    assert contents(SegmentLog(tmp_path / "outer")) == [b"next"]


def test_dropping_deletes_whole_segments_and_keeps_offsets(tmp_path):
    log = SegmentLog(tmp_path, segment_bytes=100)
    offsets = [log.append([b"x" * 40])[0] for _ in range(20)]
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
    assert again.append([b"later"]) == [end]


def test_failed_write_leaves_the_log_as_it_was(tmp_path):
    log = SegmentLog(tmp_path)
    log.append(PAYLOADS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.size + 20, hard))  # lets a part of the next record through
    try:
        with pytest.raises(OSError, match="too large"):
            log.append([b"y" * 1000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(log) == PAYLOADS and log.size == only_segment(tmp_path).stat().st_size
    log.append([b"there is room again"])
    log.close()
    again = SegmentLog(tmp_path)
    assert contents(again) == [*PAYLOADS, b"there is room again"] and again.corrupt == 0
