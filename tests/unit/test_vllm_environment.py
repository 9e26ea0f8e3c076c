"""What vLLM's processes find in their environment, and that they end with the process that started them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.engine.vllm import environment
from pipeline.errors import UsageError
from tests.vllm.processes import alive

CHAIN = """
import multiprocessing, os, time
from pipeline.engine.vllm import environment

def core():
    environment.end_with_starter()
    environment.end_with_starter()  # vLLM may call its plugins again
    multiprocessing.get_context("spawn").Process(target=worker).start()
    time.sleep(60)

def worker():
    environment.end_with_starter()
    print(os.getppid(), os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    environment.prepare(drafting=True)
    multiprocessing.get_context("spawn").Process(target=core).start()
    time.sleep(60)
"""


@pytest.fixture
def unset(monkeypatch):
    for name in (environment.RUNNER, environment.STARTER, "VLLM_WORKER_MULTIPROC_METHOD"):
        monkeypatch.setenv(name, "")  # for it to be as it was afterwards
        monkeypatch.delenv(name)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends them")
def test_a_core_and_its_workers_end_with_the_process_that_started_them(tmp_path):
    (tmp_path / "chain.py").write_text(CHAIN)
    started = subprocess.Popen(
        [sys.executable, str(tmp_path / "chain.py")], stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert started.stdout is not None
    found = [int(pid) for pid in started.stdout.readline().split()]
    assert len(found) == 2 and all(map(alive, found))
    started.kill()
    started.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, found)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, found))


def test_a_process_whose_starter_is_gone_already_ends_at_once():
    code = "from pipeline.parent import end_with_parent; end_with_parent(1 << 30); print('here')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -9 and not done.stdout


def test_other_processes_that_load_vllm_are_not_tied(unset, monkeypatch):
    monkeypatch.setattr(environment, "end_with_parent", lambda parent: pytest.fail("tied"))
    environment.end_with_starter()  # started by nobody we know
    environment.prepare(drafting=False)
    environment.end_with_starter()  # the engine itself


def test_the_model_runner_whose_sampler_is_tested_is_the_one_that_runs(unset):
    environment.prepare(drafting=True)
    assert os.environ[environment.RUNNER] == "0" and os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_another_model_runner_of_the_users_is_kept_without_drafts_and_refused_with_them(unset, monkeypatch):
    monkeypatch.setenv(environment.RUNNER, "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    environment.prepare(drafting=False)
    assert os.environ[environment.RUNNER] == "1" and os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"
    with pytest.raises(UsageError, match=rf"{environment.RUNNER}=1 .* unset it"):
        environment.prepare(drafting=True)
