"""Truncated sampling from the generator's draw to the learner's ratio."""

import numpy as np
import pytest

from learner.objective import Objective
from learner.policy import load_policy
from learner.trainer import Trainer
from learner.validation import Limits, check_trajectory, refusal
from pipeline.codec import decode_from_engine, encode_trajectory
from pipeline.config import check_config, load_config
from pipeline.config.types import LearnerSection, ObjectiveSection
from pipeline.engine.generator import GroupRequest
from pipeline.engine.leased import trajectory_of
from pipeline.engine.native.generator import NativeGenerator
from pipeline.engine.rewarding import FinishedGroup, ScoredGroup
from pipeline.errors import UsageError
from pipeline.messages import SCHEMA, BadMessage, Capabilities, Hello, Lease, SamplingParams
from pipeline.tasks.prompts import rollout_sampling
from pipeline.tasks.rewards import Scored
from tests.unit.generation import Sampled
from tests.unit.tiny_models import VOCABULARY, save_tiny

GROUP, PROMPT = 4, (1, 5, 9, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def trajectories(folder, sampling, **changes):
    """Groups of samples as they reach the learner: generated, scored, encoded, decoded."""
    generator = NativeGenerator(folder, drafter=Sampled(), max_sequences=16, max_draft_tokens=3, version=0)
    leases = [
        Lease(
            id=id, epoch=0, kind="train", prompt="", prompt_ids=PROMPT, columns={}, group_size=GROUP,
            sampling=sampling, seeds=tuple(range(GROUP * id, GROUP * id + GROUP)), version=0,
        )
        for id in range(4)
    ]  # fmt: skip
    samples = {}
    for lease in leases:
        generator.add(GroupRequest(lease.id, np.array(lease.prompt_ids), sampling, lease.seeds))
    while generator.has_work():
        samples |= {(sample.group, sample.sample): sample for sample in generator.step()}
    groups = []
    for lease in leases:
        group = FinishedGroup(lease, [samples[lease.id, index] for index in range(GROUP)])
        scored = ScoredGroup(group, [Scored(float(index % 2), "") for index in range(GROUP)])
        groups.append([decode_from_engine(encode_trajectory(trajectory_of(scored, index))) for index in range(GROUP)])
    return groups


def train(folder, groups, temperature):
    section = LearnerSection(batch_size=16, group_size=GROUP, micro_batch_tokens=256, learning_rate=1e-3)
    trainer = Trainer(load_policy(folder, "cpu"), Objective.from_config(ObjectiveSection()), section, temperature)
    return trainer.train(groups, publication=0)


@pytest.mark.parametrize(
    "settings", [{}, {"top_p": 0.8}, {"top_k": 7}, {"min_p": 0.05, "temperature": 1.3}, {"top_k": 20, "top_p": 0.9}]
)
def test_learner_and_engine_agree_on_log_probs_of_truncated_samples(folder, settings):
    sampling = SamplingParams(**{"temperature": 0.8, "max_new_tokens": 20, "stop_token_ids": (2,), **settings})
    groups = trajectories(folder, sampling)
    metrics = train(folder, groups, sampling.temperature)
    assert metrics["mismatch_k3"] < 1e-7
    assert metrics["importance_weight_mean"] == pytest.approx(1, abs=1e-3)
    assert metrics["tokens_trained"] > 100 and metrics["skipped_steps"] == 0


def test_without_the_kept_ids_they_would_not_agree(folder):
    groups = trajectories(folder, SamplingParams(top_p=0.8, max_new_tokens=20))
    for trajectory in (t for group in groups for t in group):
        trajectory.kept_counts = trajectory.kept_ids = None
    assert train(folder, groups, 1.0)["mismatch_k3"] > 1e-2


def test_samples_and_engines_without_kept_ids_are_refused_where_they_are_needed(folder):
    limits, needs = Limits(100, 100, VOCABULARY), Capabilities(kept_ids=True)
    (first, *_), *_ = trajectories(folder, SamplingParams(top_p=0.8, max_new_tokens=20))
    check_trajectory(first, "", None, limits, needs)
    with pytest.raises(BadMessage, match=r"token id \d+ in a vocabulary of 3"):
        check_trajectory(first, "", None, Limits(100, 100, 3), needs)
    first.kept_counts = first.kept_ids = None
    with pytest.raises(BadMessage, match="no kept ids"):
        check_trajectory(first, "", None, limits, needs)
    check_trajectory(first, "", None, limits, Capabilities())

    def hello(**given):
        return Hello(schema=SCHEMA, producer="p", incarnation=1, digest={}, capabilities=Capabilities(**given))

    assert refusal(hello(), {}, needs).keys == ("capabilities.kept_ids",)
    assert refusal(hello(kept_ids=True), {}, needs) is None
    assert NativeGenerator(folder).capabilities.kept_ids


@pytest.mark.parametrize(
    "setting",
    [
        "repetition_penalty=1.1", "presence_penalty=0.5", "frequency_penalty=-0.5", "logit_bias.7=2.0",
        "allowed_token_ids=[1, 2]", "bad_token_ids=[3]", "min_new_tokens=4",
    ],
)  # fmt: skip
def test_settings_that_the_learner_cannot_recompute_are_refused_before_a_run(setting):
    config = load_config(None, [f"sampling.{setting}"])
    key = setting.partition("=")[0].partition(".")[0]
    with pytest.raises(UsageError, match=rf"^sampling\.{key} = .* cannot recompute; leave it at .* for training$"):
        check_config(config)


def test_settings_of_a_run_reach_the_lease():
    settings = ["top_p=0.95", "top_k=50", "min_p=0.01", 'stop_strings=["\\n"]', "stop_token_ids=[9]", "temperature=0.9"]
    config = load_config(None, [f"sampling.{setting}" for setting in settings])
    check_config(config)
    params = rollout_sampling(config.sampling, (2,))
    assert params == SamplingParams(
        temperature=0.9, top_p=0.95, top_k=50, min_p=0.01, stop_strings=("\n",), stop_token_ids=(2, 9),
        max_new_tokens=512,
    )  # fmt: skip
    assert params.truncates and not params.penalises and not params.masks
    with pytest.raises(UsageError, match=r"\[sampling\] cannot be used"):
        rollout_sampling(load_config(None, ["sampling.logit_bias.word=1.0"]).sampling, ())
