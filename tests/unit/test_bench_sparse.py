"""What `rollahead bench sparse` concludes from what it measures."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from benchmarks import sparse
from benchmarks.sparse import FULL, WAITING, _reward, _speed, _speed_row, compression, dense_logprobs, mismatch
from benchmarks.sparse_training import _run_config, interval, verdicts_of
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError
from pipeline.models.checkpoint import load_decoder
from tests.unit.generation import finish, group
from tests.unit.test_bad_input import _write_tokenizer
from tests.unit.tiny_models import VOCABULARY, reference, reference_logits, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def sampled(folder, setting):
    decoder = load_decoder(folder, "float32", "cpu")
    generator = NativeGenerator(decoder, stop_token_ids=(), kv_compression=compression(setting, 8))
    request = group(0, prompt=[1, 5, 9, 3], samples=4, max_new_tokens=60, temperature=0.8)
    generator.add(request)
    return decoder, [(request.prompt_ids, sample, 1.0) for sample in finish(generator).values()]


def test_the_dense_policys_log_probs_are_transformers(folder):
    decoder, scored = sampled(folder, ("r-kv", 16))
    prompt, sample, _ = scored[0]
    logits = reference_logits(reference(folder), [*prompt.tolist(), *sample.token_ids.tolist()])[3:-1].double() / 0.8
    expected = logits.log_softmax(-1)[np.arange(60), sample.token_ids]
    assert np.allclose(dense_logprobs(decoder, prompt, sample.token_ids, 0.8), expected, atol=1e-4)


def test_only_a_compressed_sampler_is_away_from_the_policy(folder):
    full = mismatch(*sampled(folder, FULL), 0.8)
    assert full["k3"] < 1e-6 and full["compressed_tokens"] == full["outside_band"] == 0
    compressed = mismatch(*sampled(folder, ("sinks-window", 8)), 0.8)
    assert compressed["compressed_tokens"] == pytest.approx((60 - 13) / 60)  # 4 + n - 1 tokens are 16 after 13
    assert compressed["k3"] > 0.01 and compressed["outside_band"] > 0.05


def test_ratios_are_to_the_faster_way_to_keep_everything():
    def runs(*speeds):
        return [
            {"seconds": 1 / s, "tokens": 1, "kv_bytes": 8, "at_once": 1, "preemptions": 0, "compressions": 0}
            for s in speeds
        ]

    found = {("fixed", FULL): runs(10, 10), ("fixed", WAITING): runs(20, 25), ("fixed", ("r-kv", 64)): runs(40, 100)}
    row = _speed_row("fixed", ("r-kv", 64), found)
    assert (row["ratio_to_full"]["min"], row["ratio_to_full"]["max"]) == pytest.approx((2.0, 4.0))
    assert row["kv_saving"] == 0


def test_the_first_round_warms_up(monkeypatch):
    rounds = []

    def timed(decoder, prompts, setting, limit, repeat, options):
        rounds.append(repeat)
        seconds = 1.0 if repeat else 100.0
        return {"seconds": seconds, "tokens": 1, "kv_bytes": 8, "at_once": 1, "preemptions": 0, "compressions": 0}

    monkeypatch.setattr(sparse, "_timed", timed)
    rows = _speed(None, [], [FULL], argparse.Namespace(repeats=2, kv_bytes=1))
    assert sorted(set(rounds)) == [0, 1, 2]
    assert all(row["repeats"] == 2 and row["seconds"]["max"] == 1.0 for row in rows)


def test_a_standard_error_is_of_problems_not_of_their_responses(folder):
    decoder, scored = sampled(folder, FULL)
    prompt, sample, _ = scored[0]

    class HeldOut:
        def sample(self, generator):
            """Four problems of two responses, equal within each."""
            return [(prompt, replace(sample, group=i // 2), float(i < 4)) for i in range(8)]

    options = argparse.Namespace(sequences=1, every=8, temperature=0.8)
    row = _reward(decoder, HeldOut(), FULL, options)
    assert row["reward"] == 0.5 and row["responses"] == 8
    assert row["standard_error"] == pytest.approx(stats.sem([1, 1, 0, 0]))


def test_intervals_are_students():
    low, high = interval([0.1, 0.2, 0.3])
    assert (low, high) == pytest.approx((0.2 - 2.9200 * 0.1 / 3**0.5, 0.2 + 2.9200 * 0.1 / 3**0.5), abs=1e-4)


@pytest.mark.parametrize(
    ("corrected", "uncorrected", "words"),
    [
        ((0.80, 0.81, 0.79), (0.5, 0.52, 0.48), ("is equivalent to", "is better than")),
        ((0.70, 0.71, 0.69), (0.7, 0.71, 0.69), ("not shown to be equivalent", "not shown to be better")),
    ],
)
def test_verdicts_follow_from_the_intervals(corrected, uncorrected, words):
    arms = {
        ("full", "", 0): (0.8, 0.8, 0.8),
        ("corrected", "r-kv", 48): corrected,
        ("uncorrected", "r-kv", 48): uncorrected,
    }
    rows = [
        {"arm": arm, "policy": policy, "budget": budget, "held_out_after": value}
        for (arm, policy, budget), values in arms.items()
        for value in values
    ]
    lines = verdicts_of(rows, "r-kv", 48, 0.03)
    assert words[0] in lines[0] and words[1] in lines[1]


def test_an_unknown_policy_is_refused():
    with pytest.raises(UsageError, match="r-kv"):
        compression(("rkv", 64), 8)


@pytest.fixture
def greedy(tmp_path):
    """A command that measures rewards alone."""
    _write_tokenizer(save_tiny(tmp_path / "model"), VOCABULARY)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"question": "1 + 2", "answer": "3"}))
    return [
        "--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.jsonl"), "--repeats", "0",
        "--temperature", "0", "--policies", "sinks-window", "--budgets", "8", "--every", "4", "--max-new-tokens", "40",
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip


def test_rewards_alone_are_measured_greedily_too(greedy, tmp_path):
    assert sparse.main([*greedy, "--samples", "1"]) == 0
    full, compressed = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert full["k3"] < 1e-6 and compressed["compressed_tokens"] > 0.3 and compressed["k3"] > full["k3"]


def test_greedy_responses_to_one_problem_are_refused(greedy):
    with pytest.raises(UsageError, match="--temperature 0 gives the same response --samples 2 times; use --samples 1"):
        sparse.main(greedy)


def test_training_on_greedy_rollouts_is_refused(greedy):
    options = sparse._parser().parse_args([*greedy, "--train", greedy[3]])
    with pytest.raises(UsageError, match="gives nothing to learn from"):
        _run_config(options, "full", "", 0, 0)
