"""Learner and engines as separate processes that are killed, replaced and started in any order."""

import pytest

from tests.e2e.conftest import SMALL
from tests.e2e.runs import free_address, kill, rollahead, rows, settings, start, trained, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def configuration(tmp_path, cache):
    """A file both kinds of process read, and a function that starts one of them."""
    path = tmp_path / "c.toml"
    options = SMALL | {
        "transport__address": free_address(),
        "transport__lease_seconds": 5,
        "learner__checkpoint_every": 4,
        "run__steps": 24,
    }
    text = rollahead("run", *settings(**options), "--out", str(tmp_path / "run"), "--dry-run", cache=cache).stdout
    path.write_text(text)

    def begin(kind, *arguments):
        return start(kind, str(path), *arguments, cache=cache, log=tmp_path / f"{kind}.log")

    return tmp_path / "run", begin


def test_an_engine_killed_and_another_started_loses_and_repeats_nothing(configuration):
    run, begin = configuration
    first = begin("engine")  # before there is a learner
    learner, second = begin("learner"), begin("engine")
    wait_until(lambda: len(rows(run)) >= 3, 120, "third step", learner, first, second)
    kill(first)
    third = begin("engine")
    assert learner.wait(180) == 0
    assert second.wait(60) == 0 and third.wait(60) == 0
    assert [row["step"] for row in rows(run)] == list(range(1, 25))
    ids = trained(run)
    assert len(ids) == len(set(ids)) == 24 * 16
    assert max(row["engines"] for row in rows(run)) >= 2


def test_a_killed_learner_continues_from_checkpoint_and_journal(configuration):
    run, begin = configuration
    learner, engine = begin("learner"), begin("engine")
    for steps in (6, 13):
        wait_until(lambda steps=steps: len(rows(run)) >= steps, 120, f"step {steps}", learner, engine)
        kill(learner)
        learner = begin("learner")
    assert learner.wait(180) == 0
    assert engine.wait(60) == 0
    assert [row["step"] for row in rows(run)] == list(range(1, 25))
    ids = trained(run)
    assert len(ids) == len(set(ids)) == 24 * 16
    versions = [row["policy_version"] for row in rows(run)]
    assert versions == sorted(set(versions))
    assert all(row["staleness_mean"] >= 0 for row in rows(run))


def test_an_engine_without_a_learner_says_so_and_gives_up(configuration, tmp_path):
    _, begin = configuration
    assert begin("engine", "--connect-timeout", "2").wait(30) == 1
    log = (tmp_path / "engine.log").read_text()
    assert "waiting" in log and "Traceback" not in log
    assert log.splitlines()[-1].startswith("rollahead: ")


def test_a_second_learner_in_the_same_run_and_a_taken_address_are_refused(configuration, tmp_path, cache):
    run, begin = configuration
    learner = begin("learner")
    wait_until(lambda: (run / "weights" / "v0").exists(), 60, "first weights", learner)
    path = tmp_path / "c.toml"
    same = rollahead("learner", str(path), cache=cache)
    assert same.returncode == 2 and "another learner" in same.stderr
    other = rollahead("learner", str(path), "--set", f"run.out={tmp_path / 'other'}", cache=cache)
    assert other.returncode == 2 and "transport.address" in other.stderr
    learner.terminate()
    assert learner.wait(60) == 130


def test_an_engine_with_another_configuration_is_refused_by_name(configuration, tmp_path, cache):
    run, begin = configuration
    learner = begin("learner")
    wait_until(lambda: (run / "weights" / "v0").exists(), 60, "first weights", learner)
    refused = rollahead("engine", str(tmp_path / "c.toml"), "--set", "sampling.temperature=0.7", cache=cache)
    assert refused.returncode == 2 and "sampling" in refused.stderr
    learner.terminate()
    learner.wait(60)


def test_weights_are_broadcast_whoever_is_killed_meanwhile(tmp_path, cache):
    options = SMALL | {
        "transport__address": free_address(),
        "transport__lease_seconds": 5,
        "learner__checkpoint_every": 4,
        "learner__max_staleness": 0,
        "run__steps": 16,
        "weights__transfer": "collective",
        "weights__transfer_seconds": 10,
    }
    run, path = tmp_path / "run", tmp_path / "c.toml"
    path.write_text(rollahead("run", *settings(**options), "--out", str(run), "--dry-run", cache=cache).stdout)

    def begin(kind):
        return start(kind, str(path), cache=cache, log=tmp_path / f"{kind}.log")

    learner, engine = begin("learner"), begin("engine")
    wait_until(lambda: len(rows(run)) >= 5, 120, "step 5", learner, engine)
    kill(learner)
    learner = begin("learner")
    wait_until(lambda: len(rows(run)) >= 10, 120, "step 10", learner, engine)
    kill(engine)
    engine = begin("engine")
    assert learner.wait(180) == 0 and engine.wait(60) == 0
    assert [row["step"] for row in rows(run)] == list(range(1, 17))
    mismatches = [row["mismatch_k3"] for row in rows(run) if row["mismatch_k3"] is not None]
    assert len(mismatches) > 8 and max(mismatches) < 1e-4, "the engine computes with what was published"
    said = (tmp_path / "engine.log").read_text()
    assert said.count("weights come over gloo") == 3
