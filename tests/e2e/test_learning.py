"""Reinforcement learning raises the reward, and only because of the reward."""

from statistics import fmean

import pytest

from tests.e2e.runs import rollahead, rows, settings

pytestmark = pytest.mark.slow

WINDOW = 10


def test_reward_rises_with_the_reward_and_not_when_it_is_shuffled(tmp_path):
    """The demo's settings, shortened: with the reward to as many steps as its noise asks for (a batch's mean reward
    scatters by 0.1). Without it a policy takes a random walk, which may lead up by chance (by 0.15 in 50 steps, once;
    down by 0.3, twice): what three of them gain in the mean is compared."""

    def gain(reward: str, steps: int) -> float:
        run = tmp_path / reward.rpartition(":")[2]
        options = settings(run__steps=steps, run__measure_drafting="false", task__reward=reward)
        done = rollahead("run", *options, "--out", str(run), cache=tmp_path, timeout=900)
        assert done.returncode == 0, done.stderr
        rewards = [row["reward_mean"] for row in rows(run)]
        return fmean(rewards[-WINDOW:]) - fmean(rewards[:WINDOW])

    learnt = gain("numeric-answer", 90)
    assert learnt >= 0.15
    assert fmean(gain(f"tests.e2e.rewards:shuffled_{n}", 30) for n in range(3)) < learnt / 2
