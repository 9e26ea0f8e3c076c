"""Dumped batches, and training on them once more, bit for bit, to look into a step that went wrong.

    python -m learner.replay RUN --step N

starts from the newest checkpoint before step N, trains on the dumped batches up to it, and compares the last one's loss
and gradient norm with the run's line of metrics.jsonl. `learner.dump_batches` must be large enough to reach back to a
checkpoint. Nothing is written.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from learner import checkpoint
from learner.composition import build_objective
from learner.followers import frames_of, groups_of
from learner.step_metrics import Metrics
from learner.trainer import build_trainer
from pipeline.config import Config, load_config, resolve_threads
from pipeline.durable import write_durably
from pipeline.errors import RollaheadError, RunFailed, UsageError
from pipeline.failpoints import failpoint
from pipeline.messages import Trajectory
from pipeline.run_directory import RunDirectory
from pipeline.telemetry.metrics import read_metrics

COMPARED = ("loss", "grad_norm", "entropy", "tokens_trained")


class DumpedBatch(msgspec.Struct):
    """A file of `batches/`: what a step was trained on."""

    step: int
    """the step that this batch made"""
    publication: int
    """version of the weights it was trained from"""
    groups: list[list[list[bytes]]]
    """frames of each trajectory, by group"""


def dump(folder: Path, step: int, publication: int, groups: Sequence[Sequence[Trajectory]], keep: int) -> Path:
    """Write `folder/step-N.batch`, and delete all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    failpoint("batches.write")
    path = folder / f"step-{step}.batch"
    write_durably(path, msgspec.msgpack.encode(DumpedBatch(step, publication, frames_of(groups))))
    written = sorted(folder.glob("step-*.batch"), key=lambda file: int(file.stem.removeprefix("step-")))
    for old in written[:-keep]:
        old.unlink()
    return path


def load(path: Path) -> tuple[DumpedBatch, list[list[Trajectory]]]:
    """A dumped batch and its groups.

    Raises:
        RunFailed: the file is not there or damaged.
    """
    try:
        batch = msgspec.msgpack.decode(path.read_bytes(), type=DumpedBatch)
    except FileNotFoundError as error:
        raise RunFailed(f"{path} is not there; the run needs learner.dump_batches to reach back so far") from error
    except msgspec.MsgspecError as error:
        raise RunFailed(f"{path} is damaged: {error}") from error
    return batch, groups_of(batch.groups)


def replay(folder: Path, step: int) -> tuple[Metrics, dict[str, object]]:
    """Train the batches from the checkpoint before `step` up to it.

    Returns:
        Metrics of the step, and the run's own line for it (empty if metrics.jsonl has none).

    Raises:
        UsageError: no run there.
        RunFailed: no checkpoint or dumped batch reaches back so far.
    """
    run = RunDirectory(folder)
    if not run.config.exists():
        raise UsageError(f"{folder} is no run directory: it has no config.toml")
    config = load_config(run.config, [])
    torch.set_num_threads(resolve_threads(config.learner.threads, config))
    trainer = build_trainer(config, build_objective(config), _initial_model(config))
    root = run.checkpoints
    restored = checkpoint.restore(root, trainer.model, trainer.optimizer, before=step)
    trainer.step = restored.step if restored else 0
    if restored:
        trainer.objective.restore(restored.state["objective"])
    metrics: Metrics = {}
    for number in range(trainer.step + 1, step + 1):
        batch, groups = load(run.batches / f"step-{number}.batch")
        metrics = trainer.train(groups, batch.publication)
    rows = [row for row in read_metrics(run.metrics) if row["step"] == step]
    return metrics, rows[0] if rows else {}


def main(arguments: Sequence[str]) -> int:
    """Prints both values of each compared metric; 0 when they are the same to the last bit."""
    parser = argparse.ArgumentParser(prog="python -m learner.replay", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--step", type=int, required=True, help="optimiser batch to train once more")
    options = parser.parse_args(arguments)
    try:
        again, before = replay(options.run, options.step)
    except RollaheadError as error:
        sys.stderr.write(f"rollahead: {error}\n")
        return error.exit_code
    same = True
    for key in COMPARED:
        same &= _as_written(again[key]) == before.get(key)
        print(f"{key:<16} {again[key]!r:<24} in the run {before.get(key)!r}")
    print("the same to the last bit" if same else "not the same")
    return 0 if same else 1


def _as_written(value: object) -> object:
    """As metrics.jsonl has it: JSON has no number for the loss or the norm of a step that was skipped."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _initial_model(config: Config) -> Path:
    if config.model.path:
        return Path(config.model.path)
    from learner.warm_start import ensure_embedded_model

    return ensure_embedded_model(config, lambda progress: None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
