"""Which signals ask for a stop."""

import signal
import subprocess
import sys

import pytest

from tests.unit.rank_processes import ROOT

ASKED = """
import os, signal, sys
from pipeline.stop import StopSignal
stop = StopSignal()
os.kill(os.getpid(), signal.Signals[sys.argv[1]])
print(stop.requested)
"""


def asked(name: str, ignored: bool) -> bool:
    """Whether a process that gets the signal is asked to stop; `ignored`: it was started with the signal ignored."""

    def start() -> None:
        signal.signal(signal.Signals[name], signal.SIG_IGN if ignored else signal.SIG_DFL)

    command = [sys.executable, "-c", ASKED, name]
    ran = subprocess.run(
        command, cwd=ROOT, preexec_fn=start, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return ran.stdout == "True\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_asks_for_a_stop(name):
    assert asked(name, ignored=False)


def test_a_terminal_that_ends_does_not_stop_what_nohup_started():
    assert not asked("SIGHUP", ignored=True)


def test_a_script_s_background_process_can_be_stopped():
    """A shell starts it with SIGINT ignored, by which a run asks its learner and engines to stop."""
    assert asked("SIGINT", ignored=True)
