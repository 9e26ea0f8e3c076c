"""`rollahead run`: one command, a whole run directory."""

import json
import signal
import tomllib

import pytest

from pipeline.failpoints import VARIABLE
from tests.e2e.conftest import SMALL
from tests.e2e.runs import rollahead, rows, settings, start, trained, wait_until
from tests.unit.test_metrics import STABLE

pytestmark = pytest.mark.slow


def test_run_leaves_a_complete_run_directory_that_can_be_evaluated(tmp_path, cache, monkeypatch):
    run = tmp_path / "run"
    done = rollahead(
        "run", *settings(**SMALL | {"run__measure_drafting": "true"}, run__steps=4), "--out", str(run), cache=cache
    )
    assert done.returncode == 0, done.stderr
    assert "x the tokens/s of plain decoding" in done.stdout and "reward" in done.stdout
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    for row in rows(run):
        assert set(STABLE) <= set(row)
        assert row["tokens_trained"] > 0 and row["entropy"] > 0 and row["engines"] == 1
        assert row["mismatch_k3"] is None or row["mismatch_k3"] < 1e-4
    ids = trained(run)
    assert len(ids) == len(set(ids)) == 4 * 16
    assert tomllib.loads((run / "config.toml").read_text())["run"]["steps"] == 4
    newest = run / "checkpoints" / "step-4"
    assert json.loads((newest / "state.json").read_text())["step"] == 4
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (newest / name).exists()
    generated = rollahead("generate", str(newest), "--prompt", "1+1=", "--max-new-tokens", "16", cache=cache)
    assert generated.returncode == 0 and "verifications" in generated.stdout
    before = (run / "metrics.jsonl").read_bytes(), (run / "trained.jsonl").read_bytes()
    monkeypatch.setenv(VARIABLE, "records.write=enospc*2")  # the disk is full when the evaluation is written
    evaluated = rollahead("run", *settings(**SMALL, run__steps=4), "--eval-only", "--out", str(run), cache=cache)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "no space to write" in (run / "logs" / "learner.log").read_text()
    found = json.loads((run / "evaluation.json").read_text())
    assert found["step"] == 4 and 0 <= found["eval_reward_mean"] <= 1
    assert before == ((run / "metrics.jsonl").read_bytes(), (run / "trained.jsonl").read_bytes())


def test_truncated_sampling_trains_and_the_learner_agrees_with_what_was_sampled(tmp_path, cache):
    run = tmp_path / "run"
    truncated = {"sampling__top_p": 0.95, "sampling__top_k": 20, "learner__max_staleness": 0}
    done = rollahead("run", *settings(**SMALL | truncated, run__steps=3), "--out", str(run), cache=cache)
    assert done.returncode == 0, done.stderr
    found = rows(run)
    assert [row["step"] for row in found] == [1, 2, 3]
    assert all(row["tokens_trained"] > 0 and row["mismatch_k3"] < 1e-6 and not row["dropped"] for row in found)


def test_the_same_command_goes_on_and_another_configuration_is_refused(tmp_path, cache):
    run = tmp_path / "run"
    assert rollahead("run", *settings(**SMALL, run__steps=2), "--out", str(run), cache=cache).returncode == 0
    assert rollahead("run", *settings(**SMALL, run__steps=4), "--out", str(run), cache=cache).returncode == 0
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    ids = trained(run)
    assert len(ids) == len(set(ids)) == 4 * 16
    refused = rollahead(
        "run", *settings(**SMALL, run__steps=6, learner__learning_rate=0.5), "--out", str(run), cache=cache
    )
    assert refused.returncode == 2
    assert "learner.learning_rate" in refused.stderr and "0.5" in refused.stderr


def test_ctrl_c_keeps_state_and_the_run_goes_on(tmp_path, cache):
    run = tmp_path / "run"
    options = settings(**SMALL, run__steps=1000)
    process = start("run", *options, "--out", str(run), cache=cache, log=tmp_path / "log")
    wait_until(lambda: len(rows(run)) >= 2, 120, "second step", process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    steps = len(rows(run))
    assert (run / "checkpoints" / f"step-{steps}").exists()
    again = rollahead("run", *settings(**SMALL, run__steps=steps + 1), "--out", str(run), cache=cache)
    assert again.returncode == 0, again.stderr
    ids = trained(run)
    assert len(ids) == len(set(ids)) == (steps + 1) * 16


def test_a_reward_that_raises_costs_only_the_samples_it_raised_on(tmp_path, cache):
    run = tmp_path / "run"
    done = rollahead(
        "run",
        *settings(**SMALL, run__steps=3, task__reward="tests.e2e.rewards:fails_on_some"),
        "--out",
        str(run),
        cache=cache,
    )
    assert done.returncode == 0, done.stderr
    assert rows(run)[-1]["dropped_total"]["reward_error"] > 0
    assert "length is a multiple of three" in (run / "logs" / "engine-0.log").read_text()


def test_a_batch_that_can_never_fill_ends_with_one_sentence(tmp_path, cache):
    options = SMALL | {
        "task__reward": "tests.e2e.rewards:constant",
        "learner__dynamic_sampling": "true",
        "learner__max_filtered_batches": 2,
    }
    done = rollahead("run", *settings(**options), "--out", str(tmp_path / "run"), cache=cache)
    assert done.returncode == 1
    assert "no_signal" in done.stderr and "learner.max_filtered_batches = 2" in done.stderr
    assert "Traceback" not in done.stderr
