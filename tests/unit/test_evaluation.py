import itertools
import math

import numpy as np
import pytest
from msgspec import structs

from learner.evaluation import EVAL_LEASES, Evaluation, evaluation_source, pass_at_k
from pipeline.config import Config
from pipeline.engine.leased import request_of
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from pipeline.tasks.base import Example
from tests.unit.learner_samples import trajectory


class HeldOut:
    """A task with prompts of 1, 2, 3, ... characters."""

    def __init__(self, prompts):
        self.held_out = [Example("x" * (index + 1), {"reference": str(index)}) for index in range(prompts)]


def configuration(**learner):
    config = Config()
    config.sampling.max_prompt_tokens = 4
    for key, value in learner.items():
        setattr(config.learner, key, value)
    return config


def leases(version=3, prompts=6, **learner):
    config = configuration(**{"eval_prompts": 10, "eval_samples": 2, **learner})
    return evaluation_source(HeldOut(prompts), lambda text: [1] * len(text), SamplingParams(), config)(version)


def arrived(lease, sample, reward):
    rng = np.random.default_rng(sample)
    return trajectory(rng, lease=lease.id, sample=sample, response=3 + sample, reward=reward)


@pytest.mark.parametrize("asked", [False, True])
def test_evaluations_are_of_the_policy_as_it_is_unless_asked_otherwise(asked):
    config, lease = configuration(), next(iter(leases()))
    config.engine.switching.evaluation = config.engine.kv_compression.evaluation = asked
    for kind, as_it_is in (("eval", not asked), ("train", False)):
        request = request_of(structs.replace(lease, kind=kind), np.array(lease.prompt_ids), config)
        assert (request.policy_only, request.full_cache) == (as_it_is, as_it_is)


def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples():
    for n, c, k in [(4, 1, 1), (4, 1, 2), (5, 2, 3), (6, 0, 2), (6, 6, 6), (5, 4, 2)]:
        outcomes = [True] * c + [False] * (n - c)
        choices = list(itertools.combinations(outcomes, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(chosen) for chosen in choices) / len(choices))


def test_leases_are_pinned_disjoint_from_training_and_repeat_their_random_numbers():
    first, second = leases(version=3), leases(version=4)
    assert [len(lease.prompt_ids) for lease in first] == [1, 2, 3, 4], "longer prompts are left out"
    assert all(lease.kind == "eval" and lease.version == 3 and lease.id >= EVAL_LEASES for lease in first)
    assert not {lease.id for lease in first} & {lease.id for lease in second}
    assert [lease.seeds for lease in first] == [lease.seeds for lease in second]
    assert len({seed for lease in first for seed in lease.seeds}) == 8
    assert first[0].sampling.temperature == 1.0
    assert leases(eval_temperature=0.0, eval_samples=1)[0].sampling.temperature == 0.0
    assert len(leases(eval_prompts=2)) == 2


def test_without_held_out_prompts_the_remedy_is_named():
    with pytest.raises(UsageError, match=r"task\.held_out_path"):
        leases(prompts=0)


def test_metrics_count_failed_samples_as_wrong():
    three = leases()[:3]
    evaluation = Evaluation(three)
    rewards = [[1.0, 0.0], [1.0, 1.0], [0.5, None]]
    for lease, group in zip(three, rewards, strict=True):
        for sample, reward in enumerate(group):
            evaluation.arrive((lease.id, sample), None if reward is None else arrived(lease, sample, reward))
    assert evaluation.missing == 0
    found = evaluation.metrics(success=1.0)
    assert found["eval_reward_mean"] == pytest.approx(3.5 / 6)
    assert found["eval_pass_at_1"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["eval_pass_at_2"] == pytest.approx(2 / 3)
    assert found["eval_samples"] == 6 and found["eval_failed"] == 1
    assert found["eval_response_length_mean"] == pytest.approx((3 + 4 + 3 + 4 + 3) / 5)
    assert math.isnan(found["eval_entropy"])
    assert evaluation.metrics(success=0.5)["eval_pass_at_1"] == pytest.approx((0.5 + 1 + 0.5) / 3)


def test_leases_of_a_lost_or_silent_engine_go_to_another_and_the_first_sample_counts():
    evaluation = Evaluation(leases()[:3])
    mine = [evaluation.grant("a", 10.0) for _ in range(2)]
    theirs = evaluation.grant("b", 10.0)
    assert evaluation.grant("b", 10.0) is None
    evaluation.lost("a")
    assert [evaluation.grant("c", 20.0) for _ in range(2)] == mine
    evaluation.renew("c", [mine[0].id], 30.0)
    evaluation.expire(25.0)
    assert {evaluation.grant("d", 99.0).id for _ in range(2)} == {mine[1].id, theirs.id}
    for reward in (1.0, 0.0):
        for sample in range(2):
            evaluation.arrive((theirs.id, sample), arrived(theirs, sample, reward))
    assert evaluation.metrics(1.0)["eval_reward_mean"] == pytest.approx(2 / 6)
    evaluation.expire(1000.0)
    assert theirs.id not in [evaluation.grant("e", 0.0).id for _ in range(2)], "complete"
