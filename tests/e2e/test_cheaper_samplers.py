"""Runs whose engine samples with more than the policy: model switching with distillation, and a compressed KV cache."""

import pytest
from safetensors import safe_open

from tests.e2e.conftest import SMALL
from tests.e2e.runs import rollahead, rows, settings, trained

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def beside(tmp_path_factory, cache):
    """A checkpoint with the policy's tokenizer."""
    run = tmp_path_factory.mktemp("beside") / "run"
    done = rollahead("run", *settings(**SMALL, run__steps=1), "--out", str(run), cache=cache)
    assert done.returncode == 0, done.stderr
    return run / "checkpoints" / "step-1"


def test_a_switching_run_trains_distils_publishes_both_models_and_goes_on(tmp_path, cache, beside):
    run = tmp_path / "run"
    options = SMALL | {
        "model__path": beside,
        "engine__switching__small_model": beside,
        "engine__switching__policy_share": 0.5,
        "engine__switching__window": 1,
        "engine__switching__min_run": 1,
        "engine__switching__before_sampling": "true",
        "engine__switching__distill": "true",
        "learner__eval_every": 2,
        "learner__eval_prompts": 4,
    }
    for steps in (2, 3):
        done = rollahead("run", *settings(**options, run__steps=steps), "--out", str(run), cache=cache)
        assert done.returncode == 0, done.stderr
    found = rows(run)
    assert [row["step"] for row in found] == [1, 2, 3]
    for row in found:
        assert 0.02 < row["extra"]["sampler/policy/share"] < 0.98 and row["extra"]["small_model_kl"] >= 0
        assert row["mismatch_k3"] is None or row["mismatch_k3"] < 1e-4
    assert "eval_reward_mean" in found[1]
    ids = trained(run)
    assert len(ids) == len(set(ids)) == 3 * 16
    newest = max((run / "weights").glob("v*"), key=lambda folder: int(folder.name[1:]))
    with safe_open(newest / "model.safetensors", "pt") as file:
        names = set(file.keys())
    small = {name.removeprefix("small_model.") for name in names if name.startswith("small_model.")}
    assert small and small <= names
    assert (run / "small-model" / "step-3").is_dir()


def test_a_compressed_run_is_corrected_and_trains(tmp_path, cache):
    run = tmp_path / "run"
    options = SMALL | {
        "engine__kv_compression__policy": "r-kv",
        "engine__kv_compression__budget": 16,
        "engine__kv_compression__every": 8,
        "objective__recipe": "sparse-rl",
    }
    done = rollahead("run", *settings(**options, run__steps=2), "--out", str(run), cache=cache)
    assert done.returncode == 0, done.stderr
    found = rows(run)
    assert [row["step"] for row in found] == [1, 2]
    assert all(row["extra"]["compressed/fraction"] > 0 and row["extra"]["compressed/k3"] > 0 for row in found)
    assert all(row["tokens_trained"] > 0 for row in found)
    ids = trained(run)
    assert len(ids) == len(set(ids)) == 2 * 16
