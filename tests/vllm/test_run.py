"""A whole run on vLLM: in-flight updates, and a worker that is killed in the middle of it."""

import os
import signal

from tests.e2e.runs import rollahead, rows, settings, start, trained, wait_until
from tests.vllm.processes import descendants

OPTIONS = {
    "engine__generator": "vllm",
    "engine__vllm__enforce_eager": "true",
    "engine__dtype": "float32",
    "engine__drafter": "suffix-automaton",
    "engine__max_draft_tokens": 4,
    "engine__max_sequences": 16,
    "model__warm_start_seconds": 20,
    "learner__batch_size": 16,
    "learner__group_size": 4,
    "sampling__max_new_tokens": 64,
    "sampling__max_prompt_tokens": 64,
    "run__measure_drafting": "false",
}


def test_a_run_on_vllm_survives_the_death_of_its_worker(tmp_path):
    run, cache = tmp_path / "run", tmp_path / "cache"
    process = start("run", *settings(**OPTIONS, run__steps=5), "--out", str(run), cache=cache, log=tmp_path / "log")
    wait_until(lambda: len(rows(run)) >= 2, 600, "second step", process)
    victims = descendants(process.pid, "VLLM::Worker")
    assert victims
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    log = (run / "logs" / "engine-0.log").read_text()
    assert "vLLM's engine has died; starting it again" in log
    assert not descendants(process.pid, "VLLM::Worker")
    found = rows(run)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    ids = trained(run)
    assert len(ids) == len(set(ids)) == 5 * 16
    for row in found:
        assert not row["dropped"], row["dropped"]
        # the engine's log-probs are the learner's where both had the same weights: versions are what they say
        assert row["mismatch_k3"] is None or row["mismatch_k3"] < 1e-6
        assert row["drafters"]["suffix-automaton"]["accepted"] > 0
    assert any(row["mismatch_k3"] is not None for row in found)


def test_a_sampling_setting_that_vllm_cannot_train_on_is_refused_before_anything_starts(tmp_path):
    done = rollahead(
        "run", *settings(**OPTIONS, sampling__top_p=0.9), "--out", str(tmp_path / "run"), cache=tmp_path / "cache"
    )
    assert done.returncode == 2 and "sampling.top_p = 0.9" in done.stderr and len(done.stderr.splitlines()) == 1
