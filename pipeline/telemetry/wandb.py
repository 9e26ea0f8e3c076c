"""Weights & Biases, where it is installed (`pip install rollahead[wandb]`) and asked for (telemetry.wandb)."""

from collections.abc import Mapping
from typing import Any

from pipeline.errors import UsageError
from pipeline.telemetry.scalars import scalars


class WandbSink:
    """The same numbers as TensorBoard's; a resumed run goes on under its own id."""

    def __init__(self, project: str, run_id: str, folder: str, config: dict[str, Any], resume_step: int) -> None:
        """
        Raises:
            UsageError: the package is not installed, or it cannot start.
        """
        try:
            import wandb
        except ImportError as error:
            raise UsageError(
                f"telemetry.wandb = {project!r} needs the package wandb; pip install 'rollahead[wandb]'"
            ) from error
        try:
            self._run = wandb.init(project=project, id=run_id, dir=folder, config=config, resume="allow")
        except Exception as error:  # network, login, quota: all of them mean that it cannot be used now
            raise UsageError(
                f"telemetry.wandb = {project!r} cannot start ({error}); log in, set WANDB_MODE=offline, or leave it out"
            ) from error
        self._resume_step = resume_step

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log(scalars(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()
