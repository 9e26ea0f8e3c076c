"""What rank 0 tells the other ranks, and the loop in which they do it.

They have no sockets and no ledger. They load the same policy and checkpoint, and then take part in whatever rank 0
begins; a signal to stop is rank 0's to follow, and they end when it tells them to, or is gone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct

from learner import checkpoint, ranks
from learner.objective import Objective
from learner.policy import gathered_state
from learner.trainer import build_trainer
from pipeline.codec import decode_from_engine, encode_trajectory
from pipeline.config import Config
from pipeline.errors import RunFailed
from pipeline.messages import Trajectory
from pipeline.run_directory import RunDirectory
from pipeline.stop import StopSignal


class Begin(Struct, tag=True):
    """Load the policy from this folder, and the run's checkpoint."""

    model_folder: str


class NoBatchYet(Struct, tag=True):
    """Wait on."""


class TrainBatch(Struct, tag=True):
    """Train on this batch."""

    publication: int
    groups: list[list[list[bytes]]]
    """frames of each trajectory, by group"""


class Publish(Struct, tag=True):
    """Take part in gathering the weights."""

    dtype: str
    """torch's name of the type they are published in"""


class SaveCheckpoint(Struct, tag=True):
    """Write your part of a checkpoint."""


class Leave(Struct, tag=True):
    """The run is over for now."""


Command = Begin | NoBatchYet | TrainBatch | Publish | SaveCheckpoint | Leave
_decoder = msgspec.msgpack.Decoder(Command)


def tell(command: Command) -> None:
    """Rank 0 begins something; nothing happens where there is no other rank."""
    ranks.tell(lambda: msgspec.msgpack.encode(command))


def tell_batch(groups: Sequence[Sequence[Trajectory]], publication: int) -> None:
    """Rank 0 begins to train on a batch."""
    ranks.tell(lambda: msgspec.msgpack.encode(TrainBatch(publication, frames_of(groups))))


def frames_of(groups: Sequence[Sequence[Trajectory]]) -> list[list[list[bytes]]]:
    """A batch as it can be sent or stored."""
    return [[encode_trajectory(trajectory) for trajectory in group] for group in groups]


def groups_of(frames: list[list[list[bytes]]]) -> list[list[Trajectory]]:
    """The batch that `frames_of` was given.

    Raises:
        RunFailed: they hold something else.
    """
    return [[_trajectory(each) for each in group] for group in frames]


def _trajectory(frames: list[bytes]) -> Trajectory:
    trajectory = decode_from_engine(frames)
    if not isinstance(trajectory, Trajectory):
        raise RunFailed(f"a batch holds a {type(trajectory).__name__} in place of a trajectory")
    return trajectory


def follow(config: Config, objective: Objective) -> int:
    """Take part in a run that rank 0 leads; returns the exit code.

    Raises:
        RunFailed: rank 0 or another rank is gone.
    """
    StopSignal()
    try:
        return _follow(config, objective)
    except RuntimeError as error:
        if ranks.is_loss_of_a_rank(error):
            raise ranks.lost() from error
        raise


def _follow(config: Config, objective: Objective) -> int:
    command = _hear()
    if not isinstance(command, Begin):
        return 0
    trainer = build_trainer(config, objective, Path(command.model_folder))
    root = RunDirectory(Path(config.run.out)).checkpoints
    restored = checkpoint.restore(root, trainer.model, trainer.optimizer, dict[str, Any])
    if restored:
        trainer.step = restored.step
        objective.restore(restored.state["objective"])
    while not isinstance(command := _hear(), Leave):
        if isinstance(command, TrainBatch):
            trainer.train(groups_of(command.groups), command.publication)
        elif isinstance(command, Publish):
            gathered_state(trainer.model, getattr(torch, command.dtype))
        elif isinstance(command, SaveCheckpoint):
            try:
                checkpoint.save(root, trainer.step, trainer.model, trainer.optimizer, None)
            except OSError:
                continue  # rank 0 has it too, and says so, or tries again
    ranks.stop()
    return 0


def _hear() -> Command:
    command: Command = _decoder.decode(ranks.hear())
    return command
