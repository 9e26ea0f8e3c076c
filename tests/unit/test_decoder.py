import numpy as np
import pytest
import torch

from pipeline.models.checkpoint import load_decoder
from pipeline.models.kv_cache import PAGE, KVCache
from tests.unit.tiny_models import VOCABULARY, reference, reference_logits, save_tiny

MODELS = {
    "grouped, tied": ("Qwen3", {}),
    "one kv head, odd heads, untied": (
        "Qwen3",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": False},
    ),
    "five heads without groups, bias": (
        "Qwen3",
        {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 10, "attention_bias": True},
    ),
    "qwen2": ("Qwen2", {"head_dim": None, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "llama 3 rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e3, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
            "attention_bias": True,
        },
    ),
    "llama, linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
}  # fmt: skip


class Runner:
    """A decoder with its cache, fed row by row."""

    def __init__(self, folder, slots=8, max_length=256, dtype="float32"):
        self.decoder = load_decoder(folder, dtype, "cpu")
        each = -(-max_length // PAGE)
        self.cache = KVCache(self.decoder.config, self.decoder.dtype, torch.device("cpu"), slots * each)
        # interleaved: pages of a sequence do not lie next to each other
        self.tables = np.array([self.cache.take(1) for _ in range(slots * each)]).reshape(each, slots).T

    def __call__(self, rows, cached, first=0):
        counts = np.array([len(r) for r in rows], np.int64)
        plan = self.cache.plan(self.tables[first : first + len(rows)], np.array(cached, np.int64), counts)
        packed = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
        logits = self.decoder.logits(self.decoder.forward(packed, plan, self.cache))
        return logits.split(counts.tolist())


def tokens(seed, count):
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_in_prefill_decode_and_verification_after_rollback(name, tmp_path):
    family, overrides = MODELS[name]
    run = Runner(save_tiny(tmp_path, family, **overrides))
    model, text, rejected = reference(tmp_path), tokens(1, 30), tokens(2, 5)
    expected = reference_logits(model, text)
    assert expected.std() > 0.5, "a model of equal logits would pass for anything"

    assert_close(run([text[:12]], [0])[0], expected[:12])
    assert_close(run([text[12:13]], [12])[0], expected[12:13])
    assert_close(run([[text[13], *rejected]], [13])[0], reference_logits(model, text[:14] + rejected)[13:])
    assert_close(run([text[14:20]], [14])[0], expected[14:20])
    assert_close(run([text[20:30]], [20])[0], expected[20:])


def test_ragged_batch_equals_each_sequence_alone(tmp_path):
    run = Runner(save_tiny(tmp_path))
    model = reference(tmp_path)
    texts = [tokens(seed, n) for seed, n in enumerate((40, 7, 23, 12))]
    expected = [reference_logits(model, t) for t in texts]
    prompts = [30, 3, 23 - 9, 12 - 1]
    for actual, want, n in zip(
        run([t[:n] for t, n in zip(texts, prompts, strict=True)], [0] * 4), expected, prompts, strict=True
    ):
        assert_close(actual, want[:n])
    rest = run([t[n:] for t, n in zip(texts, prompts, strict=True)], prompts)
    for actual, want, n in zip(rest, expected, prompts, strict=True):
        assert_close(actual, want[n:])


def test_prompt_of_a_group_is_shared_but_for_its_last_page(tmp_path):
    run = Runner(save_tiny(tmp_path))
    model, prompt = reference(tmp_path), tokens(3, PAGE + 8)
    run([prompt], [0], first=2)
    for row in (0, 1):
        run.tables[row, 0] = run.tables[2, 0]
        run.cache.copy(run.tables[2, 1], run.tables[row, 1])
    continuations = [tokens(4, 4), tokens(5, 4), tokens(6, 4)]
    for actual, ending in zip(run(continuations, [PAGE + 8] * 3), continuations, strict=True):
        assert_close(actual, reference_logits(model, prompt + ending)[PAGE + 8 :])


def test_pages_are_free_when_the_last_holder_lets_go(tmp_path):
    run = Runner(save_tiny(tmp_path), slots=2, max_length=2 * PAGE)
    assert run.cache.free == 0
    run.cache.share([0, 1])
    run.cache.release([0, 1, 2])
    assert run.cache.free == 1
    run.cache.release([1])
    assert sorted(run.cache.take(2)) == [1, 2] and run.cache.free == 0


def test_what_a_page_held_before_is_not_seen(tmp_path):
    run = Runner(save_tiny(tmp_path))
    text = tokens(8, 20)
    expected = run([text], [0])[0]
    run([text], [0], first=1)
    both = run([[text[0]], text[10:]], [0, 10])
    assert_close(both[1], expected[10:])
    assert_close(both[0], expected[:1])


def test_bfloat16_follows_transformers_bfloat16(tmp_path):
    save_tiny(tmp_path)
    run = Runner(tmp_path)
    run.decoder = load_decoder(tmp_path, "bfloat16", "cpu")
    run.cache = KVCache(run.decoder.config, torch.bfloat16, torch.device("cpu"), 64)
    text = tokens(9, 24)
    exact = reference_logits(reference(tmp_path), text)
    peer = reference_logits(reference(tmp_path).to(torch.bfloat16), text)
    ours = run([text], [0])[0]
    assert (ours - exact).abs().mean() < 1.5 * (peer - exact).abs().mean()
