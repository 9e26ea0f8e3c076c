"""Where the lines of metrics.jsonl go beside the file."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from pipeline.config import Config
from pipeline.run_directory import RunDirectory


class Sink(Protocol):
    """Gets every line once, in order of steps."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """What `[telemetry]` asks for. A sink that fails is left out with a warning: a curve is not worth a run."""

    def __init__(self, sinks: list[Sink], warn: Callable[[str], None]) -> None:
        self._sinks, self._warn = sinks, warn

    def write(self, row: Mapping[str, Any]) -> None:
        for sink in list(self._sinks):
            try:
                sink.write(row)
            except Exception as error:
                self._sinks.remove(sink)
                self._failed(sink, "fails and is left out", error)

    def close(self) -> None:
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                self._failed(sink, "cannot be closed", error)

    def _failed(self, sink: Sink, how: str, error: Exception) -> None:
        self._warn(f"warning: {type(sink).__name__} {how}: {type(error).__name__}: {error}")


def learner_sinks(config: Config, run: RunDirectory, resume_step: int, log: Callable[[str], None]) -> Sinks:
    """Of the learner process.

    Raises:
        UsageError: one that was asked for cannot start.
    """
    wanted, sinks = config.telemetry, list[Sink]()
    if wanted.tensorboard:
        from pipeline.telemetry.tensorboard import TensorBoardSink

        sinks.append(TensorBoardSink(run.tensorboard, resume_step))
    if wanted.prometheus_port:
        from pipeline.telemetry.prometheus import PrometheusSink

        server = PrometheusSink(
            wanted.prometheus_host, wanted.prometheus_port, "learner", config.transport.stall_seconds
        )
        log(f"metrics at {server.address}/metrics, health at {server.address}/health")
        sinks.append(server)
    if wanted.wandb:
        from pipeline.telemetry.wandb import WandbSink

        settings = msgspec.to_builtins(config)
        sinks.append(WandbSink(wanted.wandb, run.run_id(), str(run.root), settings, resume_step))
    return Sinks(sinks, log)
