"""Weights between real processes by gloo: bit for bit, and whatever dies, the others go on."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from benchmarks.synthetic import make_hub
from learner.hub import Hub
from pipeline.models.checkpoint import load_decoder
from pipeline.weights import FilesystemPublisher
from pipeline.weights.group import Meeting
from pipeline.weights.sending import WeightsBroadcaster
from tests.integration.receiving_engine import checksum
from tests.integration.running import eventually, free_port
from tests.unit.tiny_models import save_tiny
from tests.unit.weight_routes import altered

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 2.0


class Learner:
    """The hub and the publications of a run; another one on the same folder is the learner after a restart."""

    def __init__(self, folder: Path, model: Path, address: str) -> None:
        self.folder, self.model, self.events = folder, model, []
        self.publisher = FilesystemPublisher(folder / "weights", 3, model)
        broadcaster = WeightsBroadcaster(
            folder / "weights", Meeting("tcp://127.0.0.1:0"), torch.device("cpu"), SECONDS, self.events.append, 4096
        )
        self.hub: Hub = make_hub(folder / "journal", address, events=self.events, broadcaster=broadcaster)
        self.hub.restore(None)
        self.hub.start()
        self.publish()

    def publish(self) -> int:
        version = self.publisher.version + 1
        self.publisher.publish(altered(self.model, version), version)
        began = time.monotonic()
        self.hub.publish(version)
        assert time.monotonic() - began < 0.5, "whatever engines do, the learner goes on"
        return version

    def stop(self) -> None:
        self.hub.stop()
        self.hub._journal.close()

    def said(self, text: str) -> Callable[[], bool]:
        return lambda: any(text in line for line in self.events)


class Engine:
    """A process; `lines` are what it printed."""

    def __init__(self, learner: Learner, name: str, failpoints: str = "") -> None:
        self.learner = learner
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ROLLAHEAD_FAILPOINTS": failpoints}
        folder = learner.folder
        arguments = learner.hub.address, str(folder / name), str(folder / "weights"), str(SECONDS)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.receiving_engine", *arguments],
            stdout=subprocess.PIPE, env=environment, cwd=ROOT,
        )  # fmt: skip
        self._lines: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.said: list[str] = []

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(msgspec.json.decode(line))

    def has(self, version: int) -> None:
        """Its weights are the published file's."""
        while (line := self._next())["version"] < version:
            pass
        wanted = load_decoder(self.learner.folder / "weights" / f"v{line['version']}", "float32", "cpu")
        assert line["version"] == version and line["checksum"] == checksum(wanted)

    def hears(self, text: str) -> None:
        while not any(text in line for line in self.said):
            self._next()
        self.said.clear()

    def _next(self) -> Any:
        line = self._lines.get(timeout=20.0)
        self.said += line["said"]
        return line


@contextmanager
def engines(learner: Learner, *failpoints: str) -> Iterator[list[Engine]]:
    started = [Engine(learner, f"spool-{i}-{time.monotonic_ns()}", text) for i, text in enumerate(failpoints)]
    try:
        yield started
    finally:
        for engine in started:
            engine.process.kill()
            engine.process.wait()


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[Learner]:
    made = Learner(tmp_path, save_tiny(tmp_path / "model", num_hidden_layers=4), f"tcp://127.0.0.1:{free_port()}")
    yield made
    made.stop()


def test_engines_receive_every_version_bit_by_bit_and_leave_in_order(learner):
    with engines(learner, "", "") as (one, other):
        one.hears("weights come over gloo")
        other.hears("weights come over gloo")
        for _ in range(5):
            version = learner.publish()
            one.has(version)
            other.has(version)
        assert not any("files" in line for line in one.said + other.said), "all of them came by broadcast"
        assert learner.hub.drain(10.0)
        assert one.process.wait(10) == other.process.wait(10) == 0


def test_an_engine_killed_in_the_middle_of_a_broadcast_disturbs_nobody_and_the_next_is_served(learner):
    with engines(learner, "", "weights.received=kill@7") as (one, other):
        one.hears("weights come over gloo")
        other.hears("weights come over gloo")
        version = learner.publish()
        one.has(version)
        assert other.process.wait(10) == -signal.SIGKILL
        eventually(lambda: learner.hub.stats().engines == 1)
        one.has(learner.publish())
        with engines(learner, "") as (third,):
            third.hears("weights come over gloo")
            version = learner.publish()
            third.has(version)
            one.has(version)
        assert not any("files" in line for line in one.said)


def test_an_engine_that_stops_in_the_middle_is_given_up_and_reads_files_when_it_goes_on(learner):
    with engines(learner, "", f"weights.received=sleep:{2 * SECONDS}@5*1") as (one, other):
        one.hears("weights come over gloo")
        other.hears("weights come over gloo")
        version = learner.publish()
        one.has(version)
        one.has(learner.publish())
        eventually(learner.said("reads files instead"))
        other.hears("weights are read as files")
        assert version < learner.publisher.version
        version = learner.publish()
        one.has(version)
        other.has(version)


def test_after_a_restart_of_the_learner_engines_are_in_groups_again(learner, tmp_path):
    with engines(learner, "") as (engine,):
        engine.hears("weights come over gloo")
        engine.has(learner.publish())
        learner.stop()
        again = Learner(tmp_path, learner.model, learner.hub.address)
        engine.hears("weights come over gloo")
        assert learner.publisher.version < again.publish()
        engine.has(again.publisher.version)
        again.stop()
