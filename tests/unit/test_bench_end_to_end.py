"""The end-to-end benchmark: its arithmetic and its arms."""

import pytest

from benchmarks.end_to_end import main
from benchmarks.end_to_end_analysis import compare, shares_of_waiting, time_split
from pipeline.errors import UsageError


def row(arm, seed, seconds, rewards):
    return {
        "arm": arm, "seed": seed, "step_seconds": {"median": seconds}, "seconds_to_target": seconds * 3,
        "curves": {"reward": rewards},
    }  # fmt: skip


def test_arms_are_compared_seed_by_seed():
    rows = [
        row("synchronous", 0, 4.0, [0.1, 0.5]), row("synchronous", 1, 6.0, [0.3, 0.7]),
        row("arbiter", 0, 2.0, [0.2, 0.5]), row("arbiter", 1, 4.0, [0.3, 0.6]),
    ]  # fmt: skip
    base, arbiter = compare(rows, "synchronous")
    assert base["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert arbiter["ratio"] == {"median": 1.75, "min": 1.5, "max": 2.0}
    assert arbiter["reward_gap"] == pytest.approx((0.05 - 0.05) / 2)
    assert arbiter["reward_noise"] == pytest.approx(0.2)


def test_what_the_learner_waited_for_is_what_engines_did_meanwhile():
    learner = [(0.0, 4.0, "learning"), (4.0, 10.0, "waiting for samples")]
    engine = [(0.0, 7.0, "generating"), (7.0, 8.5, "loading weights"), (8.5, 10.0, "waiting for leases")]
    shares = shares_of_waiting({"learner": learner, "engine": engine})
    assert shares == pytest.approx({"generating": 0.5, "loading weights": 0.25, "waiting for leases": 0.25})
    steps = [{"learner_time": {"learning": 4.0, "waiting for samples": 6.0}, "engine_time": {"reward": 0.5}}]
    split = time_split(steps, {"learner": learner, "engine": engine})
    assert split == pytest.approx(
        {"learning": 4.0, "generation": 3.0, "weight update": 1.5, "waiting": 1.0, "reward": 0.5}
    )
    assert sum(split.values()) == pytest.approx(10.0)
    assert shares_of_waiting({}) == {"waiting": 1.0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--arms", "nonsense"], "nonsense"), (["--arm", "x"], "NAME"), (["--arm", "x: engine.kv=1"], "engine.kv")],
)
def test_an_arm_that_cannot_be_is_refused_before_anything_runs(arguments, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        main([*arguments, "--out", str(tmp_path)])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        (["--arms", "x"], r"--arms x is unknown; there are synchronous, asynchronous, arbiter, (?!.*arbiter)"),
        (["--arms", "arbiter,arbiter"], "arm arbiter is given twice"),
        (["--arms", ""], "names no arm"),
    ],
)
def test_arms_that_are_none_or_twice_there_are_refused(tmp_path, arms, said):
    with pytest.raises(UsageError, match=said):
        main([*arms, "--out", str(tmp_path)])
