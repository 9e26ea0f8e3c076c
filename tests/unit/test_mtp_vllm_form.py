"""A head in the form that vLLM runs: its tensors as they are, and a configuration that says what the target's says."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from benchmarks.exactness_suite.model import random_checkpoint
from drafters.mtp.head import FILE
from drafters.mtp.module import MTPModule
from drafters.mtp.vllm_form import write_for_vllm
from pipeline.cli import main
from pipeline.errors import UsageError
from pipeline.models.config import ModelConfig
from tests.unit.tiny_models import save_tiny


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


def test_the_form_holds_the_heads_tensors_and_the_targets_shapes(folders, tmp_path):
    model, head, module = folders
    assert main(["export", str(model), "--drafter", str(head), "--out", str(tmp_path / "out")]) == 0
    config, target = json.loads((tmp_path / "out" / "config.json").read_text()), AutoConfig.from_pretrained(model)
    for name in ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads", "intermediate_size",
                 "rms_norm_eps", "vocab_size", "max_position_embeddings", "tie_word_embeddings"):  # fmt: skip
        assert config[name] == getattr(target, name), name
    assert config["rope_parameters"] == target.rope_parameters
    assert (config["num_hidden_layers"], config["qk_norm"], config["normed_goes_round"]) == (1, True, False)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == module.weights().keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in module.weights().items())


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_families_differ_in_norms_and_biases(kind, tmp_path):
    model = save_tiny(tmp_path / "model", kind)
    module = MTPModule(ModelConfig.from_folder(model))
    (tmp_path / "head").mkdir()
    save_file(module.weights(), tmp_path / "head" / FILE)
    write_for_vllm(model, tmp_path / "head", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["qk_norm"], config["attention_bias"]) == (False, kind == "Qwen2")


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
