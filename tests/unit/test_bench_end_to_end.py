"""The end-to-end benchmark: its arithmetic and its arms."""

import pytest

from benchmarks import end_to_end
from benchmarks.end_to_end import check_same, main
from benchmarks.end_to_end_analysis import compare, shares_of_waiting, time_split
from pipeline.config import EMBEDDED, load_config, render
from pipeline.errors import UsageError
from pipeline.run_directory import RunDirectory


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


ARGUMENTS = ["--arms", "synchronous", "--seeds", "0", "--steps", "4", "--eval-every", "2"]
ASKED_FOR = [
    "run.seed=0", "run.steps=4", "run.measure_drafting=false", "learner.eval_every=2", "learner.max_staleness=0",
    "engine.drafter=none",
]  # fmt: skip


def finished(folder, *settings):
    """A folder whose run has done its four steps."""
    run = RunDirectory(folder)
    (run.weights / "v0").mkdir(parents=True)
    run.config.write_text(render(load_config(EMBEDDED, [*ASKED_FOR, *settings])))
    run.metrics.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 5)))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("learner.learning_rate=0.5", r"learner.learning_rate \(0.5 before, .* now\)"),
        ("learner.eval_every=1", r"learner.eval_every \(1 before, 2 now\)"),
        ("run.steps=5", r"run.steps \(5 before, 4 now\)"),
        ("engine.max_draft_tokens=3", r"engine.max_draft_tokens \(3 before, .* now\)"),
    ],
)
def test_a_run_of_another_configuration_is_refused_before_anything_runs(tmp_path, monkeypatch, setting, said):
    monkeypatch.setattr(end_to_end, "_train", None)
    finished(tmp_path / "synchronous" / "seed-0", setting)
    with pytest.raises(UsageError, match=rf"holds a run with another configuration: {said}; use the same values or"):
        main([*ARGUMENTS, "--out", str(tmp_path)])


def test_a_run_of_the_same_configuration_goes_on_where_it_was(tmp_path):
    config = load_config(EMBEDDED, ASKED_FOR)
    check_same(tmp_path, config)
    finished(tmp_path, "run.out=elsewhere", "transport.address='tcp://127.0.0.1:4000'")
    check_same(tmp_path, config)


def test_steps_whose_configuration_is_not_there_are_refused(tmp_path):
    finished(tmp_path)
    (tmp_path / "config.toml").unlink()
    with pytest.raises(UsageError, match=r"cannot be compared: .*config.toml does not exist; .* another --out"):
        check_same(tmp_path, load_config(EMBEDDED, ASKED_FOR))


def test_steps_that_are_not_counted_are_too_few(tmp_path):
    with pytest.raises(UsageError, match="--steps: 2 is too small; give at least 3"):
        main(["--steps", "2", "--out", str(tmp_path)])
