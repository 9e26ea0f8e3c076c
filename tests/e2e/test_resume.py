"""Synchronous mode, fixed seeds: stopping, killing and resuming change nothing."""

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import SMALL
from tests.e2e.runs import free_address, kill, rollahead, rows, settings, start, trained, wait_until

pytestmark = pytest.mark.slow

SYNCHRONOUS = SMALL | {
    "learner__max_staleness": 0,
    "learner__checkpoint_every": 3,
    "learner__learning_rate": 1e-4,
    "engine__threads": 1,
    "learner__threads": 1,
    "transport__lease_seconds": 3,
    # How far the warm start came depends on the machine: hot enough that samples of a group, and so rewards, differ.
    "task__reward": "tests.e2e.rewards:checksum",
    "sampling__temperature": 1.5,
    # Batches of other shapes round differently; a drafter that neither measures nor remembers drafts the same again.
    "engine__drafter": '{name = "suffix-automaton", memory_mb = 0}',
    "engine__max_draft_tokens": 2,
}
STEPS = 8
CURVE = ("loss", "grad_norm", "reward_mean", "entropy", "clip_fraction", "tokens_trained")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = rollahead("run", *settings(**SYNCHRONOUS, run__steps=STEPS), "--out", str(run), cache=cache)
    assert done.returncode == 0, done.stderr
    return run


def _assert_same(run, reference):
    for row, expected in zip(rows(run), rows(reference), strict=True):
        assert {key: row[key] for key in CURVE} == {key: expected[key] for key in CURVE}, f"step {expected['step']}"
    assert trained(run) == trained(reference)
    weights, expected = (load_file(r / "checkpoints" / f"step-{STEPS}" / "model.safetensors") for r in (run, reference))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_uninterrupted_run_moves_and_is_on_policy(uninterrupted):
    table = rows(uninterrupted)
    assert len({row["loss"] for row in table}) > STEPS // 2 and all(row["grad_norm"] > 0 for row in table)
    assert all(row["staleness_max"] == 0 for row in table)
    assert all(row["mismatch_k3"] < 1e-6 for row in table)


def test_a_run_in_two_parts_equals_an_uninterrupted_one(tmp_path, cache, uninterrupted):
    run = tmp_path / "run"
    for steps in (4, STEPS):
        done = rollahead("run", *settings(**SYNCHRONOUS, run__steps=steps), "--out", str(run), cache=cache)
        assert done.returncode == 0, done.stderr
    _assert_same(run, uninterrupted)


def test_killing_learner_and_engine_changes_nothing(tmp_path, cache, uninterrupted):
    run, path = tmp_path / "run", tmp_path / "c.toml"
    options = settings(**SYNCHRONOUS, run__steps=STEPS, transport__address=free_address())
    path.write_text(rollahead("run", *options, "--out", str(run), "--dry-run", cache=cache).stdout)

    def begin(kind):
        return start(kind, str(path), cache=cache, log=tmp_path / f"{kind}.log")

    learner, engine = begin("learner"), begin("engine")
    wait_until(lambda: len(rows(run)) >= 2, 120, "step 2", learner, engine)
    kill(learner)
    learner = begin("learner")
    wait_until(lambda: len(rows(run)) >= 4, 120, "step 4", learner, engine)
    kill(engine)
    engine = begin("engine")
    assert learner.wait(180) == 0
    assert engine.wait(60) == 0
    _assert_same(run, uninterrupted)
