"""Several ranks of a learner, started by torchrun, with a real engine."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL
from tests.e2e.runs import environment, free_address, rollahead, rows, settings, start, trained, wait_until

pytestmark = pytest.mark.slow

STEPS = 15


def torchrun(path: Path, cache: Path, log: Path) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "pipeline.cli", "learner", str(path),
    ]  # fmt: skip
    with log.open("ab") as file:
        return subprocess.Popen(command, env=environment(cache), stdout=file, stderr=file)


def process_of_rank(launcher: subprocess.Popen, rank: int) -> int:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    mark = f"RANK={rank}".encode()
    of_rank = [pid for pid in children if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    return int(of_rank[0])


@pytest.mark.parametrize("killed", [0, 1])
def test_a_run_survives_the_loss_of_a_rank_and_a_change_of_their_number(tmp_path, cache, killed):
    run, path = tmp_path / "run", tmp_path / "c.toml"
    options = SMALL | {
        "transport__address": free_address(), "transport__lease_seconds": 5, "learner__checkpoint_every": 4,
        "run__steps": STEPS,
    }  # fmt: skip
    text = rollahead("run", *settings(**options), "--out", str(run), "--dry-run", cache=cache).stdout
    path.write_text(text)
    logs = [tmp_path / name for name in ("ranks.log", "learner.log", "engine.log")]

    learner, generating = torchrun(path, cache, logs[0]), start("engine", str(path), cache=cache, log=logs[2])
    wait_until(lambda: len(rows(run)) >= 5, 240, "fifth step", learner, generating)
    os.kill(process_of_rank(learner, killed), signal.SIGKILL)
    assert learner.wait(120) == 1
    assert killed == 0 or "lost another rank" in logs[0].read_text()
    assert list((run / "checkpoints" / "step-4").glob("shard-*.safetensors"))

    learner = start("learner", str(path), cache=cache, log=logs[1])
    wait_until(lambda: len(rows(run)) >= 9, 240, "ninth step", learner, generating)
    learner.terminate()
    assert learner.wait(60) == 130

    learner = torchrun(path, cache, logs[0])
    assert learner.wait(300) == 0
    assert generating.wait(60) == 0
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    ids = trained(run)
    assert len(ids) == len(set(ids)) == STEPS * 16
    exported = rollahead("export", str(run), "--out", str(tmp_path / "exported"), cache=cache)
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "exported" / "model.safetensors").is_file()
