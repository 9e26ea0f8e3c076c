"""trained.jsonl: which samples each optimiser batch was made of, so that anybody can check that none came twice."""

import json
import os
from pathlib import Path

from learner.leases import Batch


class TrainedSamples:
    """One line a step: {"step": N, "samples": [[lease, sample], ...]}; cut back to the checkpoint on resume."""

    def __init__(self, path: Path, resume_step: int) -> None:
        if path.exists():
            temporary = path.with_suffix(".cut")
            with path.open() as lines, temporary.open("w") as kept:
                kept.writelines(line.rstrip("\n") + "\n" for line in lines if _step(line) <= resume_step)
            os.replace(temporary, path)
        self._file = path.open("a")

    def write(self, step: int, batch: Batch) -> None:
        samples = [list(trajectory.id) for group in batch.groups for trajectory in group.trajectories]
        self._file.write(json.dumps({"step": step, "samples": samples}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step(line: str) -> float:
    """A line cut short by a crash belongs to no step that is kept."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
