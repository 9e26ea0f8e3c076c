"""vLLM's processes end with the engine's, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.exactness_suite.model import random_checkpoint
from benchmarks.exactness_suite.vllm import HEAD
from tests.vllm.processes import alive, descendants


def test_no_process_of_vllms_outlives_an_engine_that_is_killed(tmp_path):
    folder = random_checkpoint(tmp_path / "model", 12, sharpness=0.6, head_dim=HEAD)
    engine = subprocess.Popen(
        [sys.executable, "-m", "tests.vllm.engine_process", str(folder)], cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert engine.stdout is not None and b"ready\n" in iter(engine.stdout.readline, b"")
        found = descendants(engine.pid, "VLLM::")
        (worker,) = descendants(engine.pid, "VLLM::Worker")
        assert len(found) == 2
        os.kill(worker, signal.SIGSTOP)  # it may be what hangs, and why the engine was ended
    finally:
        engine.kill()
        engine.wait()
    deadline = time.monotonic() + 10
    while (left := list(filter(alive, found))) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
