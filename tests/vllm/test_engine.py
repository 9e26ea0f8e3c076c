"""One real engine with a small cache, on a model with tied embeddings: what is sampled, recorded, and updated."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.exactness import failures
from benchmarks.exactness_suite.generators import generate
from benchmarks.exactness_suite.model import FreshForward, random_checkpoint
from benchmarks.exactness_suite.rollouts import PROMPT, VOCABULARY, JointLaw
from benchmarks.exactness_suite.vllm import HEAD, settings, settings_checks
from pipeline.engine.generator import FinishedSample, GeneratorLost, GroupRequest
from pipeline.engine.vllm.generator import VllmGenerator
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from pipeline.sampling.exactness import processed_law
from tests.vllm.processes import descendants

BOUND = 2e-4
"""nats between a recorded log-prob and a fresh forward's"""
BLOCK, BLOCKS = 32, 24
BLOCK_BYTES = BLOCK * 2 * 2 * 2 * HEAD * 4
"""of keys and values of two layers with two heads, in float32"""


class Setup:
    """The engine, the checkpoints it has had, by version, and what its drafter complained about."""

    def __init__(self, folder: Path) -> None:
        self.folders = [
            random_checkpoint(folder / f"v{version}", VOCABULARY, sharpness=0.6, seed=version, head_dim=HEAD, tied=True)
            for version in range(2)
        ]
        self.models = [FreshForward(path) for path in self.folders]
        self.events: list[str] = []
        self.generator = VllmGenerator(
            self.folders[0], drafter={"name": "tests.vllm.watching:Watching"}, max_sequences=64, max_draft_tokens=3,
            max_length=160, dtype="float32", stop_token_ids=(), version=0, kv_bytes=BLOCKS * BLOCK_BYTES,
            options={"enforce_eager": True, "block_size": BLOCK, "enable_prefix_caching": True},
            on_event=self.events.append,
        )  # fmt: skip
        self.groups = 0

    def request(self, params: SamplingParams, seeds: int) -> GroupRequest:
        self.groups += 1
        first = 1000 * self.groups
        return GroupRequest(10**6 + self.groups, np.array(PROMPT), params, tuple(range(first, first + seeds)))

    def seen(self) -> dict[str, float]:
        return self.generator.drafter_counters()

    def load(self, version: int) -> None:
        """Checkpoints take turns."""
        self.generator.load_weights(self.folders[version % 2], version)

    def errors(self, sample: FinishedSample, where: np.ndarray | slice = slice(None)) -> np.ndarray:
        """|recorded - fresh| of the tokens at `where`, each under the checkpoint of its version, nats."""
        text = sample.token_ids.tolist()
        fresh = np.empty(len(text))
        for version in np.unique(sample.versions):
            logits = self.models[version % 2].logits([[*PROMPT, *text]])[0, len(PROMPT) - 1 : -1]
            laws = np.log([processed_law(row, SamplingParams()) for row in logits])
            mine = sample.versions == version
            fresh[mine] = laws[np.arange(len(text)), text][mine]
        return np.abs(sample.logprobs - fresh)[where]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    made = Setup(tmp_path_factory.mktemp("models"))
    yield made
    made.generator.close()
    assert not made.events, made.events  # the drafter protocol was kept throughout


def finish(setup: Setup, until: Callable[[], bool]) -> list[FinishedSample]:
    found, deadline = [], time.monotonic() + 300
    while not until():
        found += setup.generator.step()
        assert time.monotonic() < deadline
    return found


def test_every_setting_keeps_its_distribution_and_log_probs_are_those_of_a_fresh_forward(setup):
    version = setup.generator.version
    assert version % 2 == 0
    law = JointLaw(setup.folders[0])
    checks = list(
        settings_checks(
            setup.generator, "watching", setup.folders[0], law, settings(VOCABULARY, every=True), 500, 1, seed=11
        )
    )
    assert len(checks) > 20 and not failures(checks), failures(checks)


def test_a_single_text_with_a_top_k_gets_its_last_token(setup):
    """A step whose drafts are all empty ends the stock sampler."""
    for length in range(1, 10):
        (sample,) = generate(setup.generator, [setup.request(SamplingParams(top_k=3, max_new_tokens=length), 1)])
        assert len(sample.token_ids) == length


def test_the_drafter_sees_the_texts_that_are_returned_over_preemption_and_moving_rows(setup):
    before = setup.seen()
    samples = generate(setup.generator, [setup.request(SamplingParams(max_new_tokens=150), 12) for _ in range(2)])
    generate(setup.generator, [setup.request(SamplingParams(max_new_tokens=1), 1)])  # a step in which others end
    after = setup.seen()
    texts = [sample.token_ids for sample in samples]
    assert all(len(text) == 150 for text in texts)
    checksum = sum(float(((1 + np.arange(150)) * (text + 1)).sum()) for text in texts)
    gained = {key: after[key] - before[key] for key in after}
    # the single token of the last request ends before its drafter hears more than it
    assert gained["tokens"] - 24 * 150 <= 1 and gained["checksum"] - checksum <= VOCABULARY
    assert gained["tokens"] >= 24 * 150 and gained["checksum"] >= checksum
    assert gained["preempted"] == gained["restored"] > 0
    drafts = [counts for sample in samples for counts in sample.drafters.values()]
    assert {name for sample in samples for name in sample.drafters} == {"watching"}
    assert sum(counts.accepted for counts in drafts) > 0
    assert all(sum(c.accepted_at) == c.accepted <= c.drafted and max(c.tried_at) == c.tried_at[0] for c in drafts)


@pytest.mark.parametrize("recompute", [True, False])
def test_weights_change_in_flight_and_every_token_has_the_version_that_sampled_it(setup, recompute):
    setup.generator._recompute = recompute
    start = setup.seen()["tokens"]
    version = setup.generator.version
    setup.generator.add(setup.request(SamplingParams(max_new_tokens=150), 3))
    finish(setup, lambda: setup.seen()["tokens"] > start + 60)
    setup.load(version + 1)
    assert setup.seen()["version"] == version + 1
    samples = finish(setup, lambda: not setup.generator.has_work())
    samples += generate(setup.generator, [setup.request(SamplingParams(max_new_tokens=40), 2)])
    if version + 1 & 1:
        setup.load(version + 2)  # others expect the first checkpoint
        samples += generate(setup.generator, [setup.request(SamplingParams(max_new_tokens=40), 2)])
    assert len(samples) >= 5
    for sample in samples:
        assert (np.diff(sample.versions) >= 0).all()
        crossing = sample.versions[0] != sample.versions[-1]
        if recompute:
            assert setup.errors(sample).max() < BOUND
            assert not sample.kv_kept_across_update
        else:
            first = sample.versions == sample.versions[0]
            assert setup.errors(sample, first).max() < BOUND
            assert sample.kv_kept_across_update == crossing
            if crossing:
                assert setup.errors(sample, ~first).max() > BOUND  # its cache is older than its weights
    assert sum(sample.versions[0] != sample.versions[-1] for sample in samples) == 3


def test_greedy_tokens_are_the_models_own_with_log_probs_at_temperature_1(setup):
    (sample,) = generate(setup.generator, [setup.request(SamplingParams(temperature=0.0, max_new_tokens=30), 1)])
    logits = setup.models[0].logits([[*PROMPT, *sample.token_ids.tolist()]])[0, len(PROMPT) - 1 : -1]
    best = np.sort(logits, axis=1)
    near = best[:, -1] - best[:, -2] < 1e-4
    assert (near | (logits.argmax(1) == sample.token_ids)).all()
    assert setup.errors(sample).max() < BOUND


def test_a_response_ends_at_a_stop_token_or_the_limit_and_temperatures_are_a_samples_own(setup):
    params = SamplingParams(max_new_tokens=60, stop_token_ids=(3, 5))
    for sample in generate(setup.generator, [setup.request(params, 8)]):
        stopped = int(sample.token_ids[-1]) in (3, 5)
        assert sample.finish_reason == ("stop" if stopped else "length")
        assert not np.isin(sample.token_ids[:-1], (3, 5)).any()
        assert stopped or len(sample.token_ids) == 60
        assert len(sample.token_ids) == len(sample.logprobs) == len(sample.versions) == len(sample.samplers)
    request = setup.request(SamplingParams(max_new_tokens=20), 2)
    request = GroupRequest(request.id, request.prompt_ids, request.sampling, request.seeds, temperatures=(0.0, 1.0))
    greedy, _ = generate(setup.generator, [request])
    (same,) = generate(setup.generator, [setup.request(SamplingParams(temperature=0.0, max_new_tokens=20), 1)])
    assert greedy.token_ids.tolist() == same.token_ids.tolist()


def test_a_cancelled_group_gives_nothing_and_leaves_the_others_alone(setup):
    gone, stays = (setup.request(SamplingParams(max_new_tokens=100), 4) for _ in range(2))
    setup.generator.add(gone)
    setup.generator.add(stays)
    setup.generator.step()
    setup.generator.cancel(gone.id)
    setup.generator.cancel(12345)
    found = finish(setup, lambda: not setup.generator.has_work())
    assert [s.group for s in found if s.group != gone.id] == [stays.id] * 4


def test_what_vllm_cannot_sample_together_with_drafts_is_refused(setup):
    for params, said in (
        (SamplingParams(min_p=0.1), "min_p"),
        (SamplingParams(logit_bias=((1, 2.0),)), "logit_bias"),
        (SamplingParams(presence_penalty=3.0), "presence_penalty"),
        (SamplingParams(stop_token_ids=(99999,)), "stop_token_ids has token id 99999, outside the vocabulary"),
    ):
        with pytest.raises(UsageError, match=said):
            setup.generator.add(setup.request(params, 1))
    cold = GroupRequest(1, np.array(PROMPT), SamplingParams(), (1,), temperatures=(0.005,))
    with pytest.raises(UsageError, match=r"sampling\.temperature = 0\.005"):
        setup.generator.add(cold)
    with pytest.raises(UsageError, match="vocabulary"):
        setup.generator.add(GroupRequest(1, np.array([VOCABULARY + 3]), SamplingParams(), (1,)))
    assert not setup.generator.has_work()


def test_a_call_that_waits_for_an_engine_as_it_dies_ends(setup):
    """The last of this module: it takes the engine with it."""
    setup.generator.add(setup.request(SamplingParams(max_new_tokens=100), 2))
    setup.generator.step()
    (core,) = descendants(os.getpid(), "VLLM::EngineCor")
    os.kill(core, signal.SIGSTOP)  # the call is on its way, and nobody will answer it
    killed = threading.Timer(1.0, os.kill, (core, signal.SIGKILL))
    killed.start()
    with pytest.raises(GeneratorLost):
        setup.load(setup.generator.version + 1)
    killed.join()
    with pytest.raises(GeneratorLost):
        finish(setup, lambda: False)
