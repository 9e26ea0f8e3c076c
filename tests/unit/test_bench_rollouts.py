"""What `rollahead bench rollouts` reports of a run."""

import numpy as np
import pytest

from benchmarks.memory import Growth
from benchmarks.random_model import checkpoint
from benchmarks.rollout_systems import Job, Rollahead, Timing, Transformers
from benchmarks.rollouts import _by_depth, _memory

MIB = 1 << 20


def job(drafter, **options):
    prompts = [[5, 6, 7, 8] * 6, [9, 3] * 12]
    return Job(
        drafter=drafter, batch=8, prompts=prompts, group_size=4, tokens=24, temperature=0.3, max_draft_tokens=4, most=8, max_length=64, fresh=True,
        seed=1, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint("random-2x64x256", tmp_path_factory.mktemp("models"))


def test_acceptance_by_depth_adds_up_to_the_acceptance_rate(model):
    timing = Rollahead(model).run(job("prompt-lookup"))
    assert timing.tried_at and timing.tokens == 8 * 24
    assert sum(timing.accepted_at) == timing.accepted <= timing.drafted
    assert all(next_ <= good for next_, good in zip(timing.tried_at[1:], timing.accepted_at, strict=False))
    shares = _by_depth([timing, timing])
    assert shares == pytest.approx([a / t for a, t in zip(timing.accepted_at, timing.tried_at, strict=True)])


def test_depths_of_runs_are_pooled_and_missing_ones_are_not_guessed():
    runs = [
        Timing(seconds=1, tokens=1, tried_at=[4, 2], accepted_at=[2, 1]),
        Timing(seconds=1, tokens=1, tried_at=[4], accepted_at=[0]),
    ]
    assert _by_depth(runs) == [2 / 8, 1 / 2]
    assert _by_depth([Timing(seconds=1, tokens=1)]) is None


def test_growth_is_what_a_run_takes_and_what_earlier_ones_freed_counts_again():
    for _ in range(2):
        growth = Growth()
        block = np.ones(96 * MIB, np.uint8)
        del block
        assert 90 * MIB < growth.most() < 110 * MIB
    assert Growth().most() < 10 * MIB


def test_memory_of_ours_and_of_the_peer_is_measured_alike(model):
    for system in (Rollahead(model), Transformers(model)):
        system.run(job("none"))
        timed, held = system.run(job("none")), _memory(system.run(job("none", measure_memory=True)))
        assert timed.workspace_bytes is None and _memory(timed)["total_bytes"] is None
        parts = held["weights_bytes"], held["kv_bytes"], held["workspace_bytes"]
        assert held["total_bytes"] == sum(parts) and 0 < held["total_bytes"] < held["resident_bytes"]
