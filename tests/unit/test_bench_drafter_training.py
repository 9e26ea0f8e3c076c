"""`rollahead bench drafter-training`: losses from one warm start."""

import json

import pytest
import torch

from benchmarks.drafter_training import _against_entropy, main
from drafters.mtp.training import HeldOut


def test_slope_against_entropy_is_that_of_the_line():
    entropies = torch.rand(500, 1)
    alphas = 0.9 - 0.25 * entropies
    slope, bins = _against_entropy(HeldOut(alphas, entropies, torch.ones(500, 1, dtype=torch.bool)))
    assert abs(slope + 0.25) < 1e-6
    assert len(bins) == 12 and all(abs(b["acceptance"] - 0.9 + 0.25 * b["entropy"]) < 1e-6 for b in bins)


@pytest.mark.slow
def test_losses_start_from_the_same_head_and_are_compared_seed_by_seed(tmp_path, capsys):
    from learner.embedded import Architecture, build_model, save_model

    torch.manual_seed(0)
    save_model(build_model(Architecture()), tmp_path / "model")
    rows = [{"token_ids": [3 + (i * j) % 7 for j in range(1, 20)], "prompt_tokens": 4} for i in range(24)]
    (tmp_path / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = {"seeds": 1, "warm-steps": 1, "steps": 1, "batch-tokens": 200, "held-out": 6, "prompts": 2, "new-tokens": 6}
    options = [x for key, value in small.items() for x in (f"--{key}", str(value))]
    model, texts, out = (str(tmp_path / name) for name in ("model", "rollouts.jsonl", "out"))
    assert main(["--model", model, "--texts", texts, "--out", out, "--learning-rate", "0.01", *options]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["seed"], r["loss"]) for r in found["rows"]] == [
        (seed, loss) for seed in (0,) for loss in ("warm start", "ce", "e2e-tv")
    ]
    shares = {(r["seed"], r["loss"]): r["accepted_share"] for r in found["rows"]}
    difference = [100 * (shares[s, "e2e-tv"] - shares[s, "ce"]) for s in (0,)]
    spread = found["paired"]["e2e-tv"]["accepted_share"]
    assert abs(spread["min"] - min(difference)) < 1e-9 and abs(spread["max"] - max(difference)) < 1e-9
    assert all(r["generated"]["drafted"] > 0 for r in found["rows"])
    assert len(set(shares.values())) == 3
    again = ["--model", model, "--texts", texts, "--out", out, "--learning-rate", "0.01", *options]
    again[again.index("--seeds") + 1] = "2"
    capsys.readouterr()
    assert main(again) == 0
    printed = capsys.readouterr().out
    assert "seed 1" in printed and "seed 0" not in printed, "what is there is not done again"
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert rows[:3] == found["rows"] and [r["seed"] for r in rows] == [0, 0, 0, 1, 1, 1]
