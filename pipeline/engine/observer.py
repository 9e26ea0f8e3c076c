"""What an engine shows of itself: where its time goes, its numbers for Prometheus, its lines or its live view."""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import Config
from pipeline.engine.rewarding import RewardWorker, ScoredGroup
from pipeline.run_directory import RunDirectory
from pipeline.telemetry.live import EngineView
from pipeline.telemetry.log import Log
from pipeline.telemetry.prometheus import PORTS, PrometheusSink
from pipeline.telemetry.threads import cpu_seconds
from pipeline.telemetry.trace import StateClock, Trace

if TYPE_CHECKING:
    from pipeline.engine.service import Engine

SHOW_SECONDS = 1.0
SENDING_THREADS = ("spool", "engine-socket")
_ZMQ_THREADS = "ZMQbg"


class EngineObserver:
    """Told by the engine's main loop what it does; cheap enough for every step."""

    def __init__(self, config: Config, log: Callable[[str], None]) -> None:
        """
        Raises:
            UsageError: the port that was asked for cannot be listened on.
        """
        telemetry = config.telemetry
        self._trace = Trace(RunDirectory(Path(config.run.out)).trace, "engine") if telemetry.trace else None
        self._clock = StateClock("starting", self._trace)
        self._server: PrometheusSink | None = None
        if telemetry.prometheus_port:
            # the learner has the first; engines of one machine share a configuration
            self._server = PrometheusSink(
                telemetry.prometheus_host,
                telemetry.prometheus_port + 1,
                "engine",
                config.transport.stall_seconds,
                PORTS,
            )
            log(f"metrics at {self._server.address}/metrics, health at {self._server.address}/health")
        self._view = EngineView()
        self._shown = 0.0
        self._sending: float | None = None
        self._tokens: deque[tuple[float, int]] = deque(maxlen=30)
        self._drafts: dict[str, list[int]] = {}
        self._samples = self._verifications = self._response_tokens = 0
        self._newest = -1
        self._ages: deque[np.ndarray] = deque(maxlen=64)
        """publications between the newest known and those that sampled the tokens of the last groups"""

    def enter(self, state: str) -> None:
        """The main thread does this from now on."""
        self._clock.enter(state)

    def seconds(self, rewards: RewardWorker | None) -> dict[str, float]:
        """By state since the start; beside it what rewards took in other threads, and sending in all of them."""
        beside = {} if self._sending is None else {"sending": self._sending}
        return self._clock.seconds | beside | ({"reward": rewards.seconds} if rewards is not None else {})

    def scored(self, group: ScoredGroup) -> None:
        """A group is finished and has its rewards."""
        self._ages.append(np.maximum(0, self._newest - np.concatenate([s.versions for s in group.group.samples])))
        for sample in group.group.samples:
            self._samples += 1
            self._response_tokens += len(sample.token_ids)
            self._verifications += sample.verifications
            for name, counts in sample.drafters.items():
                drafts = self._drafts.setdefault(name, [0, 0])
                drafts[0] += counts.drafted
                drafts[1] += counts.accepted

    def show(self, engine: "Engine") -> None:
        """Once a second the numbers go where they are wanted."""
        now = time.monotonic()
        if now - self._shown < SHOW_SECONDS:
            return
        self._shown = now
        threads = cpu_seconds(SENDING_THREADS, _ZMQ_THREADS)
        self._sending = None if threads is None else threads + engine.link.cpu_seconds
        self._newest = max(self._newest, engine.wanted_version)
        row = self._row(engine, now)
        Log.about = {"version": row["policy_version"]}
        if self._server is not None:
            self._server.write(row)
        self._view.show({**row, "said": list(Log.recent)})

    def close(self) -> None:
        self._view.close()
        self._clock.close()
        if self._trace is not None:
            self._trace.close()
        if self._server is not None:
            self._server.close()

    def _row(self, engine: "Engine", now: float) -> dict[str, Any]:
        self._tokens.append((now, engine.generated_tokens))
        (first, tokens_then), (last, tokens_now) = self._tokens[0], self._tokens[-1]
        ages = np.concatenate(self._ages) if self._ages else np.zeros(0)
        work = list(engine.work.values())
        return {
            "newest_version": self._newest,
            "staleness_mean": float(ages.mean()) if len(ages) else None,
            "staleness_max": float(ages.max()) if len(ages) else None,
            "queue": {
                "waiting": sum(not each.started for each in work),
                "scoring": sum(each.started and not each.unfinished for each in work),
            },
            "policy_version": engine.generator.version if engine.generator is not None else -1,
            "generated_tokens_total": engine.generated_tokens,
            "tokens_per_second": (tokens_now - tokens_then) / (last - first) if last > first else 0.0,
            "sequences": engine.generator.running() if engine.generator is not None else 0,
            "leases": len(engine.work),
            "samples_total": self._samples,
            "tokens_per_verification": self._response_tokens / max(1, self._verifications),
            "drafters": {name: {"drafted": d, "accepted": a} for name, (d, a) in self._drafts.items()},
            "seconds": self._clock.seconds,
        }
