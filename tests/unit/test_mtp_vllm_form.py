"""A head in vLLM's form computes what the head does: GLM's layer with its mixture of experts, written out here."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from benchmarks.exactness_suite.model import random_checkpoint
from drafters.mtp.head import FILE
from drafters.mtp.module import MTPModule
from drafters.mtp.vllm_form import write_for_vllm
from pipeline.errors import UsageError
from pipeline.models.config import ModelConfig


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("head")
    model = random_checkpoint(folder / "model", 40, sharpness=0.6)
    torch.manual_seed(1)
    module = MTPModule(ModelConfig.from_folder(model))
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    (folder / "head").mkdir()
    save_file(module.weights(), folder / "head" / FILE)
    return model, folder / "head", module


def glm_layer(tensors, config, embedded, hidden):
    """[T, H]: h' of vLLM's `Glm4MoeMTP`, by its own source's equations."""
    prefix = f"model.layers.{config['num_hidden_layers']}."
    w = {name.removeprefix(prefix): tensor.double() for name, tensor in tensors.items()}
    eps, heads, kv, width = (
        config[k] for k in ("rms_norm_eps", "num_attention_heads", "num_key_value_heads", "head_dim")
    )

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[name + ".weight"]

    positions = torch.arange(len(embedded))
    embedded = torch.where(positions[:, None] == 0, 0.0, embedded)
    x = torch.cat([norm(embedded, "enorm"), norm(hidden, "hnorm")], -1) @ w["eh_proj.weight"].T
    y = norm(x, "input_layernorm")
    q, k, v = (
        (y @ w[f"self_attn.{n}_proj.weight"].T).view(len(y), count, width)
        for n, count in (("q", heads), ("k", kv), ("v", kv))
    )
    q, k = norm(q, "self_attn.q_norm"), norm(k, "self_attn.k_norm")
    theta = config["rope_parameters"]["rope_theta"]
    angles = positions[:, None].double() / theta ** (torch.arange(0, width, 2).double() / width)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotated(z):
        z = torch.complex(z[..., : width // 2], z[..., width // 2 :]) * turn
        return torch.cat([z.real, z.imag], -1)

    q, k = rotated(q), rotated(k)
    k, v = k.repeat_interleave(heads // kv, 1), v.repeat_interleave(heads // kv, 1)
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(width)
    scores = scores.masked_fill(positions[None, :] > positions[:, None], -math.inf)
    x = x + torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1) @ w["self_attn.o_proj.weight"].T
    y = norm(x, "post_attention_layernorm")
    chosen = torch.sigmoid(y @ w["mlp.gate.weight"].T)  # all experts are
    chosen = chosen / chosen.sum(-1, keepdim=True) * config["routed_scaling_factor"]

    def feed_forward(part):
        gate, up, down = (w[f"mlp.{part}.{n}_proj.weight"] for n in ("gate", "up", "down"))
        return (F.silu(y @ gate.T) * (y @ up.T)) @ down.T

    x = x + feed_forward("shared_experts")
    for expert in range(config["n_routed_experts"]):
        x = x + chosen[:, expert, None] * feed_forward(f"experts.{expert}")
    return norm(x, "shared_head.norm")


def test_the_layer_in_vllms_form_computes_what_the_head_does(folders, tmp_path):
    model, head, module = folders
    write_for_vllm(model, head, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(t.numel() for n, t in tensors.items() if "mlp.gate." not in n) == sum(
        t.numel() for t in module.parameters()
    )
    embedded, hidden = torch.randn(2, 11, config["hidden_size"])
    with torch.no_grad():
        wanted = next(module(embedded[None], hidden[None], 1))[0]
    found = glm_layer(tensors, config, embedded.double(), hidden.double())
    assert (found - wanted).abs().max() < 1e-4
    assert wanted.abs().max() > 0.5


def test_what_does_not_fit_is_refused(folders, tmp_path):
    model, head, _ = folders
    with pytest.raises(UsageError, match="holds no multi-token-prediction head"):
        write_for_vllm(model, model, tmp_path / "a")
    other = random_checkpoint(tmp_path / "other", 40, sharpness=0.6, head_dim=16)
    with pytest.raises(UsageError, match=r"does not fit the model .* mtp\.layers\.0\.self_attn\.k_norm"):
        write_for_vllm(other, head, tmp_path / "b")
    with pytest.raises(UsageError, match="exists already"):
        write_for_vllm(model, head, head)
    file = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(file | {"attention_bias": True}))
    with pytest.raises(UsageError, match="attention_bias"):
        write_for_vllm(other, head, tmp_path / "c")
    assert not any((tmp_path / name).exists() for name in "abc")
