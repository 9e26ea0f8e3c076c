"""Any configuration of the supported families computes what transformers computes."""

import numpy as np
import pytest
import torch

from pipeline.models.checkpoint import load_decoder
from tests.unit.test_decoder import Runner, assert_close, tokens
from tests.unit.tiny_models import reference, reference_logits, save_tiny

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}


def random_configuration(seed):
    """A family with everything that it leaves open: heads, groups, sizes, biases, scaling, windows."""
    rng = np.random.default_rng(seed)

    def one_of(*values):
        return values[int(rng.integers(len(values)))]

    family = ("Llama", "Qwen2", "Qwen3", "Mistral")[seed % 4]
    kv_heads = one_of(1, 2, 3)
    heads, head_dim = kv_heads * one_of(1, 2, 3, 5), 2 * one_of(2, 3, 4, 8)
    shape = {
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "hidden_size": {"Qwen2": heads * head_dim, "Llama": heads * one_of(2, 6)}.get(family, 8 * one_of(2, 3, 5)),
        "intermediate_size": one_of(12, 33, 50), "num_hidden_layers": one_of(1, 2, 3),
        "tie_word_embeddings": one_of(True, False), "rms_norm_eps": one_of(1e-6, 1e-5),
        "rope_parameters": one_of({"rope_type": "default", "rope_theta": 1e4}, LINEAR, LLAMA3),
    }  # fmt: skip
    if family == "Qwen2":
        shape["head_dim"] = None
    if family in ("Llama", "Qwen3"):
        shape["attention_bias"] = one_of(True, False)
    if family == "Mistral":
        shape["sliding_window"] = one_of(None, 3, 10, 40)
    if family in ("Qwen2", "Qwen3"):
        shape |= {
            "use_sliding_window": one_of(True, False), "sliding_window": one_of(4, 11),
            "max_window_layers": one_of(0, 1),
        }  # fmt: skip
    return family, shape


@pytest.mark.parametrize("seed", range(24))
def test_logits_equal_transformers_for_random_configurations(seed, tmp_path):
    family, shape = random_configuration(seed)
    run = Runner(save_tiny(tmp_path, family, seed, **shape), slots=4, max_length=96)
    model = reference(tmp_path)
    rng = np.random.default_rng(seed)
    texts = [tokens(100 * seed + row, int(n)) for row, n in enumerate(rng.integers(40, 80, 4))]
    wanted = [reference_logits(model, text) for text in texts]
    assert min(expected.std() for expected in wanted) > 0.1

    def check(counts):
        """The next `counts` tokens of each text, in one ragged pass."""
        rows = [text[n : n + count] for text, n, count in zip(texts, done, counts, strict=True)]
        for row, logits in enumerate(run(rows, done)):
            assert_close(logits, wanted[row][done[row] : done[row] + counts[row]])
            done[row] += counts[row]

    done = [0] * 4
    check(rng.integers(12, 30, 4).tolist())  # prompts
    check([1] * 4)  # a token each
    rejected = [[text[n], *tokens(7, 5)] for text, n in zip(texts, done, strict=True)]
    for row, logits in enumerate(run(rejected, done)):  # drafts that are then forgotten
        assert_close(logits, reference_logits(model, texts[row][: done[row]] + rejected[row])[done[row] :])
    check([1, 4, 2, 6])  # drafts of several lengths
    check([3, 1, 1, 2])
    check([1] * 4)


@pytest.mark.parametrize("seed", range(4))
def test_bfloat16_of_random_configurations_is_as_close_as_transformers_own(seed, tmp_path):
    family, shape = random_configuration(40 + seed)
    save_tiny(tmp_path, family, seed, **shape)
    run = Runner(tmp_path, dtype="bfloat16")
    text = tokens(seed, 60)
    exact = reference_logits(reference(tmp_path), text)
    peer = reference_logits(reference(tmp_path).to(torch.bfloat16), text)
    ours = torch.cat([run([text[:40]], [0])[0], *(run([[text[n]]], [n])[0] for n in range(40, 60))])
    assert (ours - exact).abs().mean() < 1.5 * (peer - exact).abs().mean()


def test_a_sharded_checkpoint_computes_the_same(tmp_path):
    family, shape = random_configuration(3)
    save_tiny(tmp_path / "one", family, **shape)
    reference(tmp_path / "one").save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    one, many = (load_decoder(tmp_path / name, "float32", "cpu").tensors() for name in ("one", "many"))
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


def test_a_window_is_more_than_a_limit_of_length(tmp_path):
    """Twenty times its length: what is beyond is not seen, and what is inside is."""
    run = Runner(save_tiny(tmp_path, "Mistral", sliding_window=6, num_hidden_layers=1), max_length=160)
    text = tokens(1, 120)
    other = [*tokens(2, 100), *text[100:]]
    first, second = run([text], [0])[0], run([other], [0])[0]
    assert (first[100:105] - second[100:105]).abs().max() > 0.01
    assert_close(first[105:], second[105:])
    assert_close(first, reference_logits(reference(tmp_path), text))
