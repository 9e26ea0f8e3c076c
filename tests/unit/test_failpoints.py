"""Failpoints do what they are asked to, and every one of them is in the code."""

import errno
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import failpoints
from pipeline.errors import UsageError
from pipeline.failpoints import arm, failpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm("")


def test_nothing_happens_without_the_variable():
    for name in failpoints.NAMES:
        failpoint(name)
        assert not failpoints.armed(name)


def test_errors_come_when_and_as_often_as_asked():
    arm("spool.write=enospc@3*2; journal.fsync=error")
    outcomes = []
    for _ in range(6):
        try:
            failpoint("spool.write")
            outcomes.append(0)
        except OSError as error:
            outcomes.append(error.errno)
    assert outcomes == [0, 0, errno.ENOSPC, errno.ENOSPC, 0, 0]
    with pytest.raises(OSError, match="Input/output"):
        failpoint("journal.fsync")


def test_sleep_and_probability():
    arm("ack.sent=sleep:0.05;lease.sent=error%0.5")
    began = time.monotonic()
    failpoint("ack.sent")
    assert time.monotonic() - began >= 0.05
    failed = 0
    for _ in range(400):
        try:
            failpoint("lease.sent")
        except OSError:
            failed += 1
    assert 120 < failed < 280


def test_kill_is_a_kill():
    code = "from pipeline.failpoints import failpoint\nfailpoint('ack.sent')\nprint('once')\nfailpoint('ack.sent')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"ROLLAHEAD_FAILPOINTS": "ack.sent=kill@2"}, cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("text", ["nowhere=kill", "ack.sent=explode", "ack.sent=kill@x", "ack.sent", "ack.sent=sleep:"])
def test_what_is_no_failpoint_is_a_usage_error(text):
    with pytest.raises(UsageError, match="is no failpoint"):
        arm(text)


def test_every_name_is_a_place_in_the_code():
    found = set()
    for folder in ("pipeline", "learner"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= set(re.findall(r'failpoint\(f?"([^"]+)"\)', path.read_text()))
    places = {name.format() if "{" not in name else name for name in found}
    logs = {name.replace("{self._name}", log) for name in places if "{" in name for log in ("spool", "journal")}
    assert logs | {name for name in places if "{" not in name} == set(failpoints.NAMES)
