"""A head in the naming of MiMo's checkpoints is read as what it is, its equations written out from their source."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from drafters.mtp.drafter import MTPDrafter
from drafters.mtp.head import MTPHead, head_files, head_tensors, load_head
from drafters.mtp.vllm_form import write_for_vllm
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError
from pipeline.models.checkpoint import load_decoder
from pipeline.models.kv_cache import KVCache
from tests.unit.generation import finish, group
from tests.unit.tiny_models import MIMOS_LAYER as LAYER
from tests.unit.tiny_models import add_mimos_head, save_tiny


@pytest.fixture
def folder(tmp_path):
    return add_mimos_head(save_tiny(tmp_path, "Qwen2", head_dim=None))


def test_the_first_row_is_mimos_own(folder):
    decoder = load_decoder(folder, torch.float32)
    head = MTPHead(decoder)
    load_head(head, folder)
    assert head.normed_goes_round
    w = {n.removeprefix(LAYER): t for n, t in load_file(folder / "model.safetensors").items() if n.startswith(LAYER)}
    c = decoder.config

    def norm(x, name):
        return F.rms_norm(x, x.shape[-1:], w[name + ".weight"], c.rms_norm_eps)

    def linear(x, name):
        return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))

    hidden = torch.randn(1, c.hidden_size, generator=torch.Generator().manual_seed(1))
    token = torch.tensor([5])
    # Position 0: its embedding counts as zero, it attends to itself alone, and rotation by angle zero is none.
    joined = torch.cat([norm(hidden, "hidden_layernorm"), norm(torch.zeros_like(hidden), "token_layernorm")], 1)
    x = linear(joined, "input_proj")
    value = linear(norm(x, "input_layernorm"), "self_attn.v_proj").view(1, c.kv_heads, c.head_dim)
    x = x + linear(value.repeat_interleave(c.heads // c.kv_heads, 1).flatten(1), "self_attn.o_proj")
    y = norm(x, "post_attention_layernorm")
    x = x + linear(F.silu(linear(y, "mlp.gate_proj")) * linear(y, "mlp.up_proj"), "mlp.down_proj")
    wanted = norm(x, "final_layernorm")

    cache = KVCache(head.config, head.dtype, head.device, 4)
    plan = cache.plan(torch.tensor([cache.take(1)]).numpy(), torch.tensor([0]).numpy(), torch.tensor([1]).numpy())
    found = head.forward(token, hidden, plan, cache)
    assert (head.next_input(found) - wanted).abs().max() < 1e-4
    assert (head.logits(found) - decoder.logits(wanted)).abs().max() < 1e-3


def test_a_model_with_such_a_head_drafts_with_it(folder):
    drafter = MTPDrafter(MTPDrafter.Options(max_tokens=2))
    generator = NativeGenerator(load_decoder(folder), drafter=drafter, max_sequences=4, max_draft_tokens=2)
    generator.add(group(0, [1, 4, 2, 6, 3], samples=4, max_new_tokens=12))
    finish(generator)
    assert generator.stats().drafted > 0 and generator.stats().drafter_failures == 0


def test_of_the_target_it_reads_the_state_before_the_final_norm(folder):
    decoder = load_decoder(folder, torch.float32)
    head = MTPHead(decoder)
    norm, before = head.attention.norm, torch.randn(5, decoder.config.hidden_size)
    after = norm(before, decoder.final_norm)
    assert torch.equal(head.target_input(after), after)
    load_head(head, folder)
    wanted = norm(before, head.norm_hidden)
    assert (norm(head.target_input(after), head.norm_hidden) - wanted).abs().max() < 1e-4
    assert (norm(after, head.norm_hidden) - wanted).abs().max() > 0.1


def test_its_form_for_vllm_says_that_it_feeds_itself_the_normed_state(folder, tmp_path):
    write_for_vllm(folder, folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["normed_goes_round"] and config["attention_bias"] and not config["qk_norm"]
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == head_tensors(head_files(folder)).keys()
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("MiMoForCausalLM", "Qwen2ForCausalLM"))
    with pytest.raises(UsageError, match=r"MiMo's kind and .* is no MiMo"):
        write_for_vllm(folder, folder, tmp_path / "other")


def test_a_damaged_head_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{LAYER}input_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"mtp\.fc\.weight has shape None"):
        load_head(MTPHead(load_decoder(folder)), folder)
