"""Benchmarks run from the command line in their short form, and write what they promise."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def bench(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from pipeline.cli import main; sys.exit(main())", "bench", *arguments],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def results(folder):
    found = json.loads((folder / "results.json").read_text())
    assert {"what", "machine", "versions", "model", "seed", "rows"} <= found.keys() and found["rows"]
    return found


def test_rollouts_are_measured_against_transformers(tmp_path):
    bench(
        "rollouts", "--model", "random-2x64x256", "--batch", "1,3", "--tokens", "8", "--repeats", "2", "--group-size",
        "2", "--peers", "transformers", "--threads", "1", "--waves", "1", "--out", str(tmp_path),
    )  # fmt: skip
    rows = results(tmp_path)["rows"]
    assert [(r["system"], r["drafter"], r["batch"]) for r in rows] == [
        ("rollahead", "none", 1), ("rollahead", "suffix-automaton", 1), ("transformers", "none", 1),
        ("transformers", "prompt-lookup", 1), ("rollahead", "none", 3), ("rollahead", "suffix-automaton", 3),
        ("transformers", "none", 3),
    ]  # fmt: skip
    for row in rows:
        assert row["tokens"] == {1: 2 * 8, 3: 4 * 8}[row["batch"]]
        speed = row["tokens_per_second"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert row["ratio_to_plain"]["median"] > 0 and row["memory"]["resident_bytes"] > 0
    ours = [row for row in rows if row["system"] == "rollahead"]
    assert all(row["ratio_to_peer"]["transformers"]["median"] > 0 for row in ours)
    assert all(0 < row["outside_forward"]["median"] < 1 for row in ours)
    assert all(row["memory"]["total_bytes"] > row["memory"]["weights_bytes"] > 0 for row in rows)
    assert all(len(row["acceptance_by_depth"] or [0]) <= 4 for row in ours) and ours[0]["acceptance_by_depth"] is None


def test_a_long_queue_is_measured_against_a_short_one(tmp_path):
    bench(
        "queue", "--model", "random-2x64x256", "--queued", "300", "--batch", "2", "--steps", "6", "--repeats", "2",
        "--tokens", "8", "--out", str(tmp_path),
    )  # fmt: skip
    rows = results(tmp_path)["rows"]
    assert [row["drafter"] for row in rows] == ["none", "suffix-automaton"]
    assert all(row["queued"] == 300 and row["tokens"] > 0 and row["cost"]["median"] < 1 for row in rows)


def test_a_compiled_step_gives_the_same_logits_and_is_timed_against_the_native_one(tmp_path):
    bench(
        "compiled-decode", "--model", "random-1x64x256", "--batch", "2", "--repeats", "1", "--steps", "2", "--threads",
        "1", "--out", str(tmp_path),
    )  # fmt: skip
    (row,) = results(tmp_path)["rows"]
    assert row["compile_seconds"] > 0 and row["native_over_compiled"]["median"] > 0


def test_bandwidth_share_runs_without_a_gpu(tmp_path):
    bench(
        "decode-bandwidth", "--models", "random-2x64x256", "--batch", "1,2", "--tokens", "4", "--repeats", "1",
        "--device", "cpu", "--out", str(tmp_path),
    )  # fmt: skip
    assert [row["batch"] for row in results(tmp_path)["rows"]] == [1, 2]


def test_a_training_step_is_measured_against_trl_on_the_same_loss(tmp_path):
    pytest.importorskip("trl")
    bench("learner", "--what", "speed", "--short", "--out", str(tmp_path))
    found = results(tmp_path)
    assert [(r["system"], r["checkpointing"], r.get("share_prompts")) for r in found["rows"]] == [
        ("rollahead", False, True), ("rollahead", True, True), ("rollahead", False, False), ("trl", False, None),
        ("trl", True, None),
    ]  # fmt: skip
    losses = [row["first_loss"] for row in found["rows"]]
    assert max(losses) - min(losses) < 1e-5 and abs(losses[0]) > 1e-3
    assert all(
        row["step_bytes"] > 0 and row["peak_bytes"] > row["step_bytes"] and row["tokens_per_second"]["min"] > 0
        for row in found["rows"]
    )
    assert len(found["verdicts"]) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rolouts"], "did you mean rollouts"),
        (["rollouts", "--model", "nowhere"], "neither a folder nor"),
        (["rollouts", "--model", "random-2x64x256", "--peers", "llama", "--batch", "1"], "known are"),
    ],
)
def test_a_wrong_benchmark_command_is_said_in_one_line(arguments, said, tmp_path):
    out = bench(*arguments, *(["--out", str(tmp_path)] if len(arguments) > 1 else []), code=2)
    assert said in out and "Traceback" not in out
