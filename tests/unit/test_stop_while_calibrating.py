"""An engine that still looks for its threshold of switching ends when it is asked to."""

import json
import os
import signal
import time
from types import SimpleNamespace

import pytest

from pipeline.config import load_config
from pipeline.engine.link import Drained
from pipeline.engine.service import Engine
from pipeline.run_directory import RunDirectory
from pipeline.stop import StopSignal
from tests.unit.test_switching import with_tokenizer
from tests.unit.tiny_models import save_tiny

POLLS = 5


class Link:
    """Says to stop, one way or another, when it is listened to for the fifth time."""

    def __init__(self, run, say):
        self.run, self._say, self.polls, self.left, self.updates = run, say, 0, None, 0

    def poll(self, timeout):
        self.polls += 1
        return self._say() if self.polls == POLLS else []

    def update(self, **state):
        self.updates += 1

    def leave(self, leases):
        self.left = leases

    def flush(self, seconds):
        return True


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield StopSignal()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("way", ["interrupted", "drained"])
def test_an_engine_stops_while_it_calibrates_and_says_when_it_begins(tmp_path, stop, way):
    folder = with_tokenizer(save_tiny(tmp_path / "policy"), {"<unk>": 0, **{f"w{i}": i for i in range(1, 60)}})
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "w3 w4", "answer": "#### 1"}))
    config = load_config(None, [
        f"run.out={tmp_path / 'run'}", f"model.path={folder}", f"engine.switching.small_model={folder}",
        "engine.switching.policy_share=0.5", "task.kind=jsonl", f"task.path={tmp_path / 'train.jsonl'}",
        "sampling.max_new_tokens=200", "sampling.max_prompt_tokens=16",
    ])  # fmt: skip
    says = {"interrupted": lambda: os.kill(os.getpid(), signal.SIGINT) or [], "drained": lambda: [Drained()]}
    link, said, beats = Link(RunDirectory(tmp_path / "run").known_run_id(), says[way]), [], []
    follower = SimpleNamespace(fetch=lambda version: (folder, SimpleNamespace(version=0)))
    observer = SimpleNamespace(enter=lambda state: None, seconds=lambda rewards: {}, show=lambda engine: None)
    engine = Engine(config, link, follower, [], stop, said.append, lambda: beats.append(1), observer)
    engine.wanted_version = 0
    began = time.monotonic()
    engine.run()
    assert time.monotonic() - began < 30
    assert link.polls == POLLS and engine.generator is None and link.left == ()
    assert len(beats) == link.polls, "a long calibration is no stall"
    assert [line for line in said if line.startswith("switching: ")] == [
        "switching: looking for the threshold at which the policy samples 50.0% of the tokens: 1 prompts, 9 times"
    ]
