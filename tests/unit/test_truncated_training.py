"""Truncated sampling from the generator's draw to the learner's ratio."""

import numpy as np
import pytest
import torch

from learner.objective import Objective
from learner.policy import load_policy
from learner.trainer import Trainer
from learner.validation import Limits, check_trajectory, refusal
from pipeline.codec import decode_from_engine, encode_trajectory
from pipeline.config import check_config, load_config
from pipeline.config.types import LearnerSection, ObjectiveSection
from pipeline.engine.generator import GroupRequest
from pipeline.engine.leased import trajectory_of
from pipeline.engine.native.compression import KVCompression
from pipeline.engine.native.eviction import build as build_policy
from pipeline.engine.native.generator import NativeGenerator
from pipeline.engine.native.switching import SwitchingRule
from pipeline.engine.rewarding import FinishedGroup, ScoredGroup
from pipeline.errors import UsageError
from pipeline.messages import SCHEMA, BadMessage, Capabilities, Hello, Lease, Sampler, SamplingParams
from pipeline.tasks.prompts import rollout_sampling
from pipeline.tasks.rewards import Scored
from tests.unit.generation import Sampled
from tests.unit.tiny_models import VOCABULARY, reference, reference_logits, save_tiny

GROUP, PROMPT = 4, (1, 5, 9, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def trajectories(folder, sampling, **options):
    """Groups of samples as they reach the learner: generated, scored, encoded, decoded."""
    options = {"drafter": Sampled(), "max_sequences": 16, "max_draft_tokens": 3, "version": 0, **options}
    generator = NativeGenerator(folder, **options)
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


def train(folder, groups, temperature, **options):
    section = LearnerSection(batch_size=16, group_size=GROUP, micro_batch_tokens=256, learning_rate=1e-3, **options)
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


def full_logprobs(folder, sample, temperature):
    """Of a sample's tokens under the policy, over all ids; float64 [T]."""
    ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.token_ids]).astype(np.int64))
    logits = reference_logits(reference(folder), ids.tolist()).double()[len(PROMPT) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, ids[len(PROMPT) :, None])[:, 0].numpy()


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 0.7}, {"min_p": 0.1, "temperature": 0.8}])
@pytest.mark.parametrize("other", ["switched", "compressed"])
def test_tokens_of_another_sampler_are_weighed_by_the_policy_over_all_ids(
    folder, tmp_path, monkeypatch, settings, other
):
    """Over the ids that the other sampler kept, pi / mu would be about 1 whatever the policy thinks of its tokens."""
    if other == "switched":
        monkeypatch.setattr("pipeline.engine.native.small_model.check_same_tokenizer", lambda *_: None)
        small = save_tiny(tmp_path, seed=5, num_hidden_layers=1)
        options = {"small_model": small, "switching": SwitchingRule(threshold=3.5, window=2, min_run=3)}
        which = Sampler.SWITCHED_MODEL
    else:
        options = {"kv_compression": KVCompression(build_policy({"name": "sinks-window", "sinks": 1}), 4, 2)}
        which = Sampler.COMPRESSED_KV
    sampling = SamplingParams(**{"max_new_tokens": 20, **settings})
    groups = trajectories(folder, sampling, drafter=None, **options)
    samples = [sample for group in groups for sample in group]
    metrics = train(folder, groups, sampling.temperature, minibatches=1)
    theirs = np.concatenate([sample.samplers for sample in samples]) == int(which)
    assert 0.1 < theirs.mean() < 0.95
    pi = np.concatenate([full_logprobs(folder, sample, sampling.temperature) for sample in samples])
    log_ratio = (pi - np.concatenate([sample.logprobs for sample in samples]))[theirs]
    k3 = float((np.exp(log_ratio) - log_ratio - 1).mean())
    assert metrics["k3/other_samplers"] == pytest.approx(k3, rel=1e-3) and k3 > 0.1
    weights = np.exp(log_ratio).clip(max=2)  # tis, with its default cap
    mass = weights.sum() / (weights.sum() + (~theirs).sum())
    assert metrics[f"sampler/{which.name.lower().replace('_', '-')}/mass"] == pytest.approx(mass, rel=1e-3)
    assert metrics["mismatch_k3"] < 1e-7, "the policy's own tokens are renormalised over what it kept"
    assert metrics["clip_fraction"] == 0, "pi_new and pi_old are over the same ids"


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
