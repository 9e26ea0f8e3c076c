"""All layers in one compiled call compute what they compute one by one, no less exactly, on any number of threads."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from drafters.mtp.head import MTPHead
from pipeline.models import cpu_layers, cpu_products
from pipeline.models.checkpoint import load_decoder
from pipeline.models.config import ModelConfig
from pipeline.models.kv_cache import KVCache
from pipeline.models.linear import Linear
from pipeline.models.precision import most_compiled_rows
from tests.unit.tiny_models import save_tiny

pytestmark = pytest.mark.skipif(
    not cpu_products.supported(), reason="this processor does not multiply pairs of bfloat16"
)
CPU = torch.device("cpu")
SHAPES = {
    "one KV head": ("Qwen3", {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 64, "hidden_size": 64}),
    "three KV heads": ("Qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}),
    "biases": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "attention_bias": True}),
    "biases of Qwen2": ("Qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": None}),
    "windows": ("Mistral", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 40}),
    "a head of its own": ("Llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}),
}  # fmt: skip


def saved(folder, name, seed=0):
    family, shape = SHAPES[name]
    shape = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "vocab_size": 384, **shape}
    return save_tiny(folder, family, seed, num_hidden_layers=3, **shape)


class Passes:
    """The same ragged passes through one decoder: prompts, a token each, drafts, drafts after some were rejected."""

    COUNTS = ((33, 40, 70), (1, 1, 1), (4, 1, 6), (2, 3, 1))

    def __init__(self, decoder):
        self.decoder = decoder
        self.cache = KVCache(decoder.config, decoder.dtype, CPU, 12)

    def run(self):
        """Hidden states and logits of each pass."""
        tables, cached = np.random.default_rng(1).permutation(12).reshape(3, 4), np.zeros(3, np.int64)
        generator = torch.Generator().manual_seed(2)
        for counts in map(np.array, self.COUNTS):
            tokens = torch.randint(0, 384, (int(counts.sum()),), generator=generator)
            hidden = self.decoder.forward(tokens, self.cache.plan(tables, cached, counts), self.cache)
            yield hidden.float(), self.decoder.logits(hidden)
            cached = cached + np.minimum(counts, 2)


@pytest.mark.parametrize("name", SHAPES)
def test_no_less_exact_than_layer_by_layer(name, tmp_path, threads):
    """Both differ from float32 by the rounding of bfloat16; a mistake would differ by far more."""
    folder = saved(tmp_path, name)
    exact, compiled, plain = (load_decoder(folder, dtype=kind) for kind in ("float32", "bfloat16", "bfloat16"))
    compiled.most_compiled_rows, plain.most_compiled_rows = 1000, 0
    assert compiled.takes_compiled(143) and not plain.takes_compiled(1)
    runs = [Passes(decoder) for decoder in (exact, compiled, plain)]
    errors = np.zeros((2, 2))
    for wanted, *found in zip(*(run.run() for run in runs), strict=True):
        for way, pair in enumerate(found):
            for what in range(2):
                assert pair[what].shape == wanted[what].shape
                errors[way, what] += (pair[what] - wanted[what]).pow(2).mean().sqrt() / wanted[what].std()
    assert (errors[0] < 1.2 * errors[1] + 1e-3).all(), errors
    assert (errors[1] < 0.3).all(), "or the comparison says nothing"
    stores = [run.cache.store.float() for run in runs]
    assert (stores[1] - stores[0]).pow(2).mean() < 1.5 * (stores[2] - stores[0]).pow(2).mean()


def test_threads_do_not_change_what_is_computed(tmp_path):
    decoder = load_decoder(saved(tmp_path, "biases"), dtype="bfloat16")
    decoder.most_compiled_rows, before, found = 1000, torch.get_num_threads(), []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        found.append(list(Passes(decoder).run()))
    torch.set_num_threads(before)
    for other in found[1:]:
        for pair, first in zip(other, found[0], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(pair, first, strict=True))


def test_states_of_layers_and_single_layers_are_those_of_the_pass(tmp_path):
    decoder = load_decoder(saved(tmp_path, "biases"), dtype="bfloat16")
    decoder.most_compiled_rows = 1000
    tokens, caches = torch.arange(5), [KVCache(decoder.config, decoder.dtype, CPU, 1) for _ in range(3)]
    plans = [cache.plan(np.zeros((1, 1), np.int64), np.zeros(1, np.int64), np.array([5])) for cache in caches]
    states: list[torch.Tensor] = []
    whole = decoder.forward(tokens, plans[0], caches[0])
    assert torch.equal(decoder.forward(tokens, plans[1], caches[1], states), whole)
    x = states[0].clone()
    for layer in range(3):
        after = decoder.block(layer, x, plans[2], caches[2])
        assert torch.equal(after, states[layer + 1])
        assert torch.equal(x, states[layer]), "the rows that a layer is given are left alone"
        x = after
    assert all(torch.equal(cache.store, caches[0].store) for cache in caches[1:])


def test_some_of_the_layers_are_computed_in_one_call_too(tmp_path):
    decoder = load_decoder(saved(tmp_path, "biases"), dtype="bfloat16")
    found = []
    for rows in (1000, 0):
        decoder.most_compiled_rows = rows
        cache = KVCache(decoder.config, decoder.dtype, CPU, 1)
        plan = cache.plan(np.zeros((1, 1), np.int64), np.zeros(1, np.int64), np.array([5]))
        found.append((decoder.forward(torch.arange(5), plan, cache, only=[0, 2]), cache.store))
    x = decoder.embedding[torch.arange(5)]
    decoder.most_compiled_rows, cache = 1000, KVCache(decoder.config, decoder.dtype, CPU, 1)
    for layer in (0, 2):
        x = decoder.block(layer, x, plan, cache)
    assert torch.equal(decoder.attention.norm(x, decoder.final_norm), found[0][0])
    assert torch.equal(cache.store, found[0][1]) and not cache.store[1].any()
    torch.testing.assert_close(found[0][0].float(), found[1][0].float(), atol=0.1, rtol=0.1)


def test_new_weights_are_computed_with(tmp_path):
    decoder = load_decoder(saved(tmp_path / "a", "biases"), dtype="bfloat16")
    other = load_decoder(saved(tmp_path / "b", "biases", seed=1), dtype="bfloat16")
    decoder.most_compiled_rows = other.most_compiled_rows = 1000
    list(Passes(decoder).run())
    decoder.load(other.tensors().__getitem__)
    for found, wanted in zip(Passes(decoder).run(), Passes(other).run(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_weights_that_came_in_part_are_not_looked_for_where_the_old_ones_were(tmp_path):
    decoder = load_decoder(saved(tmp_path, "biases"), dtype="bfloat16")
    decoder.most_compiled_rows, tensors = 1000, decoder.tensors()
    broken = tensors.keys() - {"model.layers.2.mlp.down_proj.weight"}
    with pytest.raises(KeyError):
        decoder.load({name: tensors[name] for name in broken}.__getitem__)
    assert not decoder.takes_compiled(1)
    list(Passes(decoder).run())
    decoder.load(tensors.__getitem__)
    assert decoder.takes_compiled(1)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("bfloat16", {"intermediate_size": 200}), ("bfloat16", {"hidden_size": 96}), ("float32", {})],
    ids=["inner size no multiple of 64", "hidden size no multiple of 64", "float32"],
)
def test_models_that_cannot_be_computed_so_are_computed_layer_by_layer(kind, shape, tmp_path):
    family, own = SHAPES["biases"]
    save_tiny(tmp_path, family, **{"hidden_size": 128, "intermediate_size": 192, **own, **shape})
    decoder = load_decoder(tmp_path, dtype=kind)
    assert not decoder.takes_compiled(1)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (384, 96), (7, 64), (130, 160)])
def test_products(outputs, inputs, packed, threads):
    if packed and outputs % 64:
        pytest.skip("packed weights have a multiple of 64 outputs here")
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    linear = Linear({"w": outputs}, inputs, torch.bfloat16, CPU, tied=None if packed else weight)
    linear.load(lambda name: weight)
    assert linear.weight.is_mkldnn == packed and cpu_layers.takes_product(linear)
    for rows in range(1, 15):
        x = torch.randn(rows, inputs, generator=generator).bfloat16()
        wanted = x.double() @ weight.double().T
        found = cpu_layers.product(x, linear)
        assert found.dtype == torch.float32 and (found - wanted).abs().max() < 1e-5 * inputs


def test_a_smaller_team_than_was_asked_for_does_not_wait_for_threads_that_are_not_there(tmp_path):
    """As under a limit of OpenMP's, or inside another team."""
    folder = saved(tmp_path, "biases")
    code = (
        "import sys, torch\n"
        "torch.set_num_threads(2)\n"
        "from tests.unit.test_cpu_layers import digest\n"
        "print(digest(sys.argv[1]))\n"
    )
    limited = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=os.environ | {"OMP_THREAD_LIMIT": "1"}, capture_output=True,
        text=True, timeout=120, check=True,
    )  # fmt: skip
    assert limited.stdout.strip() == digest(folder)


def digest(folder):
    """Of all logits."""
    decoder = load_decoder(folder, dtype="bfloat16")
    decoder.most_compiled_rows = 1000
    return hashlib.sha256(b"".join(logits.numpy().tobytes() for _, logits in Passes(decoder).run())).hexdigest()


def test_how_many_rows_is_measured_once_for_a_model(tmp_path):
    config = ModelConfig.from_folder(saved(tmp_path, "biases"))
    most = most_compiled_rows(config, torch.get_num_threads())
    assert 1 <= most <= 96
    assert most_compiled_rows(config, torch.get_num_threads()) == most


def test_a_draft_head_is_no_less_exact_than_layer_by_layer(tmp_path, threads):
    folder = saved(tmp_path, "three KV heads")
    generator = torch.Generator().manual_seed(5)
    decoders = [load_decoder(folder, dtype=kind) for kind in ("float32", "bfloat16", "bfloat16")]
    decoders[1].most_compiled_rows, decoders[2].most_compiled_rows = 1000, 0
    heads = [MTPHead(decoder) for decoder in decoders]
    weights = {
        name: torch.randn(shape, generator=generator) * 0.1 + (len(shape) == 1)
        for name, shape in heads[0].shapes.items()
    }
    tokens, hidden = torch.randint(0, 384, (12,), generator=generator), torch.randn(12, 128, generator=generator)
    found = []
    for head in heads:
        head.load(weights.__getitem__)
        cache, counts = KVCache(head.config, head.dtype, CPU, 3), np.array([5, 1, 6])
        plan = cache.plan(np.arange(3)[:, None], np.zeros(3, np.int64), counts)
        out = head.forward(tokens, hidden.to(head.dtype), plan, cache)
        found.append(head.logits(out))
    assert heads[1].takes_compiled(12) and not heads[2].takes_compiled(12)
    compiled, plain = ((logits - found[0]).pow(2).mean().sqrt() / found[0].std() for logits in found[1:])
    assert compiled < 1.2 * plain + 1e-3 and plain < 0.1


def test_a_row_is_computed_alike_whatever_stands_beside_it(tmp_path, threads):
    decoder = load_decoder(saved(tmp_path, "one KV head"), dtype="bfloat16")
    decoder.most_compiled_rows = 1000
    cache = KVCache(decoder.config, decoder.dtype, CPU, 14)
    tables, tokens = np.arange(14)[:, None], torch.arange(14 * 9).view(14, 9)
    prompts = cache.plan(tables, np.zeros(14, np.int64), np.full(14, 9))
    decoder.forward(tokens.flatten(), prompts, cache)

    def logits(rows, counts):
        chosen = torch.cat([tokens[row, :count] for row, count in zip(rows, counts, strict=True)])
        plan = cache.plan(tables[rows], np.full(len(rows), 9), np.array(counts))
        return decoder.logits(decoder.forward(chosen, plan, cache))

    alone = [logits([row], [1])[0] for row in range(14)]
    assert torch.equal(logits(list(range(14)), [1] * 14), torch.stack(alone))
    together = logits([3, 5, 7], [4, 1, 2])
    assert (
        torch.equal(together[0], alone[3]) and torch.equal(together[4], alone[5]) and torch.equal(together[5], alone[7])
    )
    one_by_one = [logits([3], [count])[-1] for count in (1, 2, 3, 4)]
    assert torch.equal(together[:4], torch.stack(one_by_one))
