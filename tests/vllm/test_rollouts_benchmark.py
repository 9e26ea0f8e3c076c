"""`rollahead bench rollouts --peers vllm`: vLLM with its own drafters, vLLM with ours, and the native generator."""

import importlib.util
import json
import subprocess
import sys

from benchmarks.exactness_suite.model import random_checkpoint
from benchmarks.exactness_suite.vllm import HEAD


def test_rollouts_are_measured_against_vllm(tmp_path):
    own = ["none", "ngram@2", *(["suffix"] if importlib.util.find_spec("arctic_inference") else [])]
    model = random_checkpoint(tmp_path / "model", 64, sharpness=1.0, head_dim=HEAD)
    done = subprocess.run(
        [
            sys.executable, "-m", "pipeline.cli", "bench", "rollouts", "--model", str(model), "--batch", "1,3",
            "--tokens", "12", "--waves", "1", "--repeats", "1", "--group-size", "2", "--peers", "vllm",
            "--threads", "1",
            "--vllm-eager", "--vllm-drafters", ",".join(own), "--same-prompts", "--out", str(tmp_path / "out"),
        ],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    configurations = [("native", "none"), ("native", "suffix-automaton"), *(("vllm", name) for name in own)]
    configurations.append(("vllm", "suffix-automaton"))
    assert [(r["generator"], r["drafter"], r["batch"]) for r in rows] == [
        (*configuration, batch) for batch in (1, 3) for configuration in configurations
    ]
    for row in rows:
        assert row["tokens"] == {1: 2 * 12, 3: 4 * 12}[row["batch"]]
        assert row["tokens_per_second"]["median"] > 0 and row["memory"]["weights_bytes"] > 0
        if row["system"] == "rollahead":
            assert row["ratio_to_peer"]["vllm"]["median"] > 0 and row["peer_configuration"]["vllm"] in own
    mine = [row for row in rows if row["drafter"] == "suffix-automaton"]
    assert all(row["acceptance_rate"] is not None for row in mine)
