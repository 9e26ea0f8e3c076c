"""A disk that is full, under every writer: the run waits or stops with a clear line, and goes on when there is space.

Once in a small tmpfs that is filled to the last byte, where the machine lets us mount one in a private namespace; and
once for each writer, by a failpoint that says "no space" in its place.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fault_kills import RUN_SECONDS, Lab, audit, kill_process, make_model, reap
from benchmarks.synthetic import free_address

SIZE_MB = 24
FULL_SECONDS = 4.0


WRITERS = (
    "spool.write", "journal.write", "publish.written", "checkpoint.written", "records.write", "batches.write",
    "tensors.write",
)  # fmt: skip


def disk_full(root: Path, thorough: bool = True) -> dict[str, Any]:
    """The small disk, then every writer by itself; each run is audited and compared with one that had space.

    Args:
        thorough: False: only the two writers that samples pass through, and no tmpfs.
    """
    root.mkdir(parents=True, exist_ok=True)
    disk = _small_disk(root / "tmpfs") if thorough else {"skipped": "short form", "problems": []}
    writers = _each_writer(root / "writers", WRITERS if thorough else WRITERS[:2])
    return {"tmpfs": disk, "writers": writers, "problems": disk.pop("problems") + writers.pop("problems")}


def _small_disk(root: Path) -> dict[str, Any]:
    """Runs this file in a namespace of its own, on a tmpfs."""
    root.mkdir()
    mount = f"mount -t tmpfs -o size={SIZE_MB}m none {root} && exec {sys.executable} -m benchmarks.fault_disk {root}"
    command = ["unshare", *([] if os.geteuid() == 0 else ["-r"]), "-m", "sh", "-c", mount]
    here = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, cwd=here, check=False,
            env=os.environ | {"PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    except FileNotFoundError as error:
        return {"skipped": str(error), "problems": []}
    if done.returncode == 0:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
    reason = (done.stderr.strip().splitlines() or ["?"])[-1]
    if "mount" in reason or "unshare" in reason:  # not allowed here
        return {"skipped": reason, "problems": []}
    return {"problems": [f"tmpfs: {reason}"]}


def run_on_a_small_disk(root: Path) -> dict[str, Any]:
    """A run to its end although its disk is full for a while."""
    model, reference = _calm(root)
    lab = _lab(root / "full", model)
    ballast = root / "ballast"
    stopped = _to_the_end(lab, ballast)
    return _findings(lab, reference, stopped)


def _each_writer(root: Path, names: Sequence[str]) -> dict[str, Any]:
    model, reference = _calm(root)
    found: dict[str, Any] = {"problems": []}
    for name in names:
        lab = _lab(root / name, model)
        stopped = _to_the_end(lab, None, f"{name}=enospc@2*1")
        found[name] = _findings(lab, reference, stopped)
        found["problems"] += [f"{name}: {problem}" for problem in found[name].pop("problems")]
    return found


def _calm(root: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A model, and the metrics of a run that nothing happens to."""
    root.mkdir(exist_ok=True)
    model = make_model(root / "model")
    lab = _lab(root / "calm", model)
    _to_the_end(lab, None)
    return model, lab.rows()


def _lab(root: Path, model: Path) -> Lab:
    return Lab(root, model, free_address(), max_staleness=0)


def _findings(lab: Lab, reference: list[dict[str, Any]], stopped: int) -> dict[str, Any]:
    found = audit(lab, reference)
    said = "".join(path.read_text() for path in sorted(lab.root.glob("*.log")))
    lines = sorted({line.replace(str(lab.run), "RUN") for line in said.splitlines() if "pace" in line})
    problems = [] if found.clean else [str(found)]
    if not lines:
        problems.append("nobody said that the disk is full")
    return {"said": lines, "stopped_with_code_1": stopped, "problems": problems}


def _to_the_end(lab: Lab, ballast: Path | None, failpoints: str = "") -> int:
    """Run until the learner is done; returns how often it stopped by itself for want of space.

    Args:
        ballast: filled after two steps until there is no space, and deleted some seconds later.
    """
    learner, engine = lab.start("learner", failpoints), lab.start("engine", failpoints)
    stopped, full_until = 0, 0.0
    deadline = time.monotonic() + RUN_SECONDS
    try:
        while time.monotonic() < deadline:
            if ballast is not None and not full_until and lab.step() >= 2:
                _fill(ballast)
                full_until = time.monotonic() + FULL_SECONDS
            if ballast is not None and full_until and time.monotonic() > full_until:
                ballast.unlink()
                ballast = None
            if reap(learner) == 0:
                return stopped
            if reap(learner) is not None and ballast is None:
                stopped += 1
                learner = lab.start("learner")
            if reap(engine) not in (None, 0) and ballast is None:
                engine = lab.start("engine")
            time.sleep(0.02)
        raise RuntimeError(f"the run in {lab.root} did not come to its end; see its logs")
    finally:
        for pid in (learner, engine):
            kill_process(pid)


def _fill(path: Path) -> None:
    """Take all the space there is."""
    with path.open("wb", buffering=0) as file:
        block = bytes(1 << 16)
        while block:
            try:
                file.write(block)
            except OSError:
                block = block[: len(block) // 2]


if __name__ == "__main__":
    print(json.dumps(run_on_a_small_disk(Path(sys.argv[1]))))
