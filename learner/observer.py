"""What the learner shows of itself beside metrics.jsonl: sinks, samples, trace, its lines or live view."""

import json
import sys
from collections.abc import Callable
from typing import Any

from learner.leases import Batch
from pipeline.config import Config
from pipeline.errors import UsageError
from pipeline.run_directory import RunDirectory
from pipeline.telemetry.environment import environment
from pipeline.telemetry.live import RunView
from pipeline.telemetry.log import Log
from pipeline.telemetry.samples import SampleLog, describe_batch
from pipeline.telemetry.sinks import learner_sinks
from pipeline.telemetry.trace import StateClock, Trace


class LearnerObserver:
    """Told by the training loop what it does, and what came of each step."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        resume_step: int,
        decode: Callable[[list[int]], str],
        log: Callable[[str], None],
        *,
        cut_back: bool = True,
    ) -> None:
        """
        Args:
            cut_back: leave out of samples.jsonl what is of later steps than `resume_step`.

        Raises:
            UsageError: a sink that the configuration asks for cannot start, or a file cannot be written.
        """
        telemetry = config.telemetry
        Log.about = {"run": run.run_id(), "step": resume_step}
        try:
            run.environment.write_text(json.dumps(environment(), indent=1) + "\n")
            self._trace = Trace(run.trace, "learner") if telemetry.trace else None
            self._samples = SampleLog(run.samples, resume_step if cut_back else sys.maxsize)
        except OSError as error:
            raise UsageError(f"{run.root} cannot be written ({error.strerror or error}); free space there") from error
        self._clock = StateClock("starting", self._trace)
        self._seconds_before: dict[str, float] = {}
        self._decode, self._a_step = decode, telemetry.samples
        self._sinks = learner_sinks(config, run, resume_step, log)
        self._view = RunView(config.run.steps, resume_step)

    def enter(self, state: str) -> None:
        """The main thread does this from now on."""
        self._clock.enter(state)

    def step_seconds(self) -> dict[str, float]:
        """By state since the last call."""
        now = dict(self._clock.seconds)
        before, self._seconds_before = self._seconds_before, now
        return {state: seconds - before.get(state, 0.0) for state, seconds in now.items()}

    def step(self, row: dict[str, Any], batch: Batch) -> None:
        """A finished step: its line of metrics, and what was trained on."""
        Log.about = Log.about | {"step": row["step"], "version": row["policy_version"]}
        trajectories = [(group.lease.prompt, t) for group in batch.groups for t in group.trajectories]
        for sample in describe_batch(row["step"], trajectories, self._a_step, self._decode):
            self._samples.write(sample)
            self._view.sample(sample)
        self._sinks.write(row)
        if self._trace is not None:
            samples = row["samples"]
            self._trace.counter("samples", in_flight=samples["in_flight"], buffered=samples["buffered"])
        self._view.show(row)

    def close(self) -> None:
        self._view.close()
        self._clock.close()
        if self._trace is not None:
            self._trace.close()
        self._samples.close()
        self._sinks.close()
