"""What an engine has finished outlives it."""

import os
import signal
import subprocess
import sys

import pytest

from pipeline.errors import UsageError
from pipeline.transport.spool import Spool

LIMIT = 1 << 20
WRITER = """
import sys, time
from pathlib import Path
from pipeline.transport.spool import Spool
spool = Spool.acquire(Path(sys.argv[1]), 1 << 20)
for sample in range(5):
    spool.append([((7, sample), [b"header", bytes([sample]) * 100])])
spool.forget([(7, 1)])
spool.bind("some run")
print(spool.producer, flush=True)
time.sleep(60)
"""


def test_killed_engines_spool_is_adopted_with_everything_in_it(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    producer = writer.stdout.readline().strip()
    beside = Spool.acquire(tmp_path, LIMIT)
    assert beside.producer != producer and beside.pending() == []

    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    adopted = Spool.acquire(tmp_path, LIMIT)
    assert (adopted.producer, adopted.incarnation, adopted.run) == (producer, 1, "some run")
    # Forgetting is not durable: sample 1 is there again, and the learner will recognise it.
    assert adopted.pending() == [(7, sample) for sample in range(5)]
    assert [adopted.read((7, s)) for s in range(5)] == [[b"header", bytes([s]) * 100] for s in range(5)]
    assert adopted.size_of((7, 4)) == 106 and adopted.size_of((8, 0)) == 0
    adopted.close()
    assert Spool.acquire(tmp_path, LIMIT).incarnation == 2


def test_pending_samples_are_listed_oldest_first_until_forgotten(tmp_path):
    spool = Spool.acquire(tmp_path, LIMIT)
    samples = [(lease, sample) for lease in (3, 1) for sample in range(3)]
    assert spool.append([(sample, [b"%d" % sample[1]]) for sample in samples]) == samples
    spool.forget([(3, 1), (9, 9)])
    assert spool.pending() == [sample for sample in samples if sample != (3, 1)]
    assert spool.read((3, 1)) is None
    assert spool.read((1, 2)) == [b"2"]


def test_pending_sample_is_not_written_twice(tmp_path):
    spool = Spool.acquire(tmp_path, LIMIT)
    spool.append([((0, 0), [b"first"])])
    size = spool.size
    assert spool.append([((0, 0), [b"again"])]) == []
    assert spool.read((0, 0)) == [b"first"] and spool.size == size


def test_full_spool_has_room_again_when_its_samples_are_forgotten(tmp_path):
    spool = Spool.acquire(tmp_path, limit_bytes=20_000)
    count = 0
    while not spool.full:
        spool.append([((count, 0), [b"x" * 500])])
        count += 1
    assert count == pytest.approx(20_000 / 530, abs=2)
    spool.forget([(lease, 0) for lease in range(count - 1)])
    spool.reclaim()
    assert spool.size < 3_000
    assert spool.read((count - 1, 0)) == [b"x" * 500]
    spool.forget([(count - 1, 0)])
    spool.reclaim()
    assert spool.size == 0


def test_damaged_identity_is_refused_with_its_path(tmp_path):
    spool = Spool.acquire(tmp_path, LIMIT)
    spool.close()
    (spool.folder / "identity.json").write_text("{")
    with pytest.raises(UsageError, match=r"identity\.json is damaged"):
        Spool.acquire(tmp_path, LIMIT)


def test_unwritable_place_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="choose another output folder"):
        Spool.acquire(tmp_path / "file", LIMIT)


def test_spools_of_another_key_are_left_alone(tmp_path):
    first = Spool.acquire(tmp_path, LIMIT, owner="aaaa")
    first.append([((0, 0), [b"x"])])
    first.close()
    assert first.producer.startswith("aaaa-")
    for owner in ("bbbb", ""):
        other = Spool.acquire(tmp_path, LIMIT, owner=owner)
        assert other.producer != first.producer and other.pending() == []
        other.close()
    again = Spool.acquire(tmp_path, LIMIT, owner="aaaa")
    assert again.producer == first.producer and again.pending() == [(0, 0)]
    again.close()


@pytest.mark.parametrize(
    "record", [b"", b"no record of this version", b"\1\0\0\0\3\0\0\0abc", b"\x92\x92\7\0\x91\xc4\1x"]
)
def test_spool_of_another_version_is_refused_with_its_folder(tmp_path, record):
    spool = Spool.acquire(tmp_path, LIMIT)
    spool._log.append([[record]])
    spool.close()
    with pytest.raises(UsageError, match="another version"):
        Spool.acquire(tmp_path, LIMIT)
