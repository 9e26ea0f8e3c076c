"""Reinforcement learning raises the reward, and only because of the reward."""

from statistics import fmean

import pytest

from tests.e2e.runs import rollahead, rows, settings

pytestmark = pytest.mark.slow

WINDOW = 10


def _gain(run) -> float:
    rewards = [row["reward_mean"] for row in rows(run)]
    return fmean(rewards[-WINDOW:]) - fmean(rewards[:WINDOW])


def test_reward_rises_with_the_reward_and_not_when_it_is_shuffled(tmp_path):
    """The demo's settings, shortened: with the reward to as many steps as its noise asks for (a batch's mean reward
    scatters by 0.1)."""
    gains = {}
    for name, steps in (("numeric-answer", 90), ("tests.e2e.rewards:shuffled", 50)):
        run = tmp_path / name.rpartition(":")[2]
        short = {"run__steps": steps, "run__measure_drafting": "false"}
        done = rollahead("run", *settings(**short, task__reward=name), "--out", str(run), cache=tmp_path, timeout=900)
        assert done.returncode == 0, done.stderr
        gains[name] = _gain(run)
    assert gains["numeric-answer"] >= 0.15
    assert gains["tests.e2e.rewards:shuffled"] < 0.1
