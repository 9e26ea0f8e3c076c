"""Weights that are broadcast to vLLM's workers: its logits are then those of transformers on the published files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from benchmarks.exactness_suite.generators import generate
from benchmarks.exactness_suite.model import FreshForward, random_checkpoint
from benchmarks.exactness_suite.rollouts import PROMPT, VOCABULARY
from benchmarks.exactness_suite.vllm import HEAD
from pipeline.engine.generator import FinishedSample, GeneratorLost, GroupRequest
from pipeline.engine.vllm.generator import VllmGenerator
from pipeline.failpoints import arm
from pipeline.messages import SamplingParams, WeightsWanted
from tests.integration.running import eventually
from tests.unit.weight_routes import Following, Learner, altered

BOUND = 2e-4
"""nats between a recorded log-prob and a fresh forward's"""


class Setup(Following):
    """A learner, and an engine on vLLM's CPU backend that has its first publication."""

    def __init__(self, folder: Path, tied: bool, **options: Any) -> None:
        self.model = random_checkpoint(folder / "model", VOCABULARY, sharpness=0.6, head_dim=HEAD, tied=tied)
        self.root = folder / "weights"
        learner = Learner(self.root, self.model, 4096)
        learner.start()
        learner.publisher.publish(load_file(self.model / "model.safetensors"), 0)
        generator = VllmGenerator(
            self.root / "v0", drafter={"name": "none"}, max_sequences=8, max_length=160, dtype="float32",
            stop_token_ids=(), version=0, kv_bytes=1 << 22, options={"enforce_eager": True, **options},
        )  # fmt: skip
        super().__init__("collective", folder, learner, generator)  # type: ignore[arg-type]
        self.groups = 0

    def publish(self) -> int:
        version = self.learner.publisher.version + 1
        self.learner.publisher.publish(altered(self.model, version), version)
        return version

    def request(self, tokens: int, seeds: int = 4) -> GroupRequest:
        self.groups += 1
        params, first = SamplingParams(max_new_tokens=tokens), 100 * self.groups
        return GroupRequest(self.groups, np.array(PROMPT), params, tuple(range(first, first + seeds)))

    def errors(self, sample: FinishedSample, version: int) -> np.ndarray:
        """|recorded - fresh| of the tokens of a version, nats."""
        text = sample.token_ids.tolist()
        logits = FreshForward(self.root / f"v{version}").logits([[*PROMPT, *text]])[0, len(PROMPT) - 1 : -1]
        fresh = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found = np.abs(sample.logprobs - fresh[np.arange(len(text)), text])
        return found[sample.versions == version]

    def check(self, version: int) -> None:
        """New samples are that version's."""
        for sample in generate(self.generator, [self.request(30)]):
            assert (sample.versions == version).all() and self.errors(sample, version).max() < BOUND

    def asked(self) -> int:
        return sum(isinstance(message, WeightsWanted) for message in self.learner.asked)

    def end(self) -> None:
        self.close()
        self.learner.stop()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def setup(request, tmp_path_factory) -> Iterator[Setup]:
    made = Setup(tmp_path_factory.mktemp("run"), request.param)
    yield made
    made.end()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("pipeline.engine.live_weights._RETRY_SECONDS", 0.2)
    yield
    arm("")


def test_logits_after_a_broadcast_are_those_of_transformers_on_the_published_files(setup):
    setup.ready()
    before = setup.asked()
    for _ in range(2):
        version = setup.publish()
        setup.get(version)
        setup.check(version)
    assert setup.asked() == before + 2 and not [line for line in setup.events if "files" in line]


@pytest.mark.parametrize("recompute", [True, False])
def test_weights_change_in_flight_and_tokens_have_their_versions(setup, recompute):
    setup.ready()
    setup.generator._recompute = recompute
    old = setup.generator.version
    setup.generator.add(setup.request(140))
    samples = setup.generator.step()  # a moment, in which some tokens are sampled
    version = setup.publish()
    setup.get(version)
    while setup.generator.has_work():
        samples += setup.generator.step()
    assert len(samples) == 4
    for sample in samples:
        assert set(sample.versions.tolist()) <= {old, version} and (np.diff(sample.versions) >= 0).all()
        kept = sample.versions[0] == old and not recompute
        assert sample.kv_kept_across_update == (not recompute)
        if not kept:
            assert setup.errors(sample, version).max(initial=0.0) < BOUND
        assert setup.errors(sample, old).max(initial=0.0) < BOUND


def test_a_broadcast_that_ends_in_the_middle_leaves_files_and_another_group_to_come(setup):
    setup.ready()
    setup.generator.add(setup.request(100))
    arm("weights.sent=error@4")
    version = setup.publish()
    setup.get(version)
    assert any("read as files" in line for line in setup.events) and not setup.engine._torn
    while setup.generator.has_work():
        assert all(sample.versions[-1] == version for sample in setup.generator.step())
    setup.check(version)
    arm("")
    setup.ready()
    setup.events.clear()
    version = setup.publish()
    setup.get(version)
    setup.check(version)
    assert not [line for line in setup.events if "files" in line]


def test_workers_that_share_tensors_all_receive(tmp_path):
    made = Setup(tmp_path, tied=True, tensor_parallel_size=2)
    try:
        made.ready()
        version = made.publish()
        made.get(version)
        made.check(version)
        assert made.asked() == 1 and not [line for line in made.events if "files" in line]
        assert any("2 of its processes over gloo" in line for line in made.learner.events)
    finally:
        made.end()


def test_an_engine_core_killed_in_the_middle_costs_the_learner_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ROLLAHEAD_FAILPOINTS", "weights.received=kill@5")  # of vLLM's processes alone
    made = Setup(tmp_path, tied=True)
    try:
        made.ready()
        made.engine.wanted_version = made.publish()
        with pytest.raises(GeneratorLost):
            made.until(lambda: False, 60.0)
        eventually(lambda: any("reads files instead" in line for line in made.learner.events))
        made.engine._begin_again(GeneratorLost("vLLM's engine has died"))
        assert made.engine.generator is None and not made.engine._torn, "another one begins with files"
    finally:
        made.end()
