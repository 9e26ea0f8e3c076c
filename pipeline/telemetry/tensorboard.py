"""TensorBoard event files, written by tensorboardX: a small writer without TensorFlow or TensorBoard itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from pipeline.telemetry.scalars import scalars


class TensorBoardSink:
    """Every number of every step."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        # steps after the checkpoint of an interrupted run are not shown
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None, flush_secs=10)

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in scalars(row).items():
            if name != "step":
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()
