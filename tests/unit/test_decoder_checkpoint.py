import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import UsageError
from pipeline.models.checkpoint import load_decoder, load_weights_into
from pipeline.models.config import UNLIMITED, ModelConfig
from pipeline.models.precision import choose
from tests.unit.tiny_models import reference, save_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_sharded_and_single_checkpoints_give_the_same_weights(saved, tmp_path):
    reference(saved).save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").exists() and not (tmp_path / "model.safetensors").exists()
    one, many = load_decoder(saved, "float32", "cpu").tensors(), load_decoder(tmp_path, "float32", "cpu").tensors()
    assert len(one) > 20
    for name, tensor in one.items():
        assert torch.equal(tensor, many[name]), name


def test_auto_dtype_is_the_checkpoints_or_what_holds_it_and_is_faster(folder):
    assert load_decoder(folder, "auto", "cpu").dtype == torch.float32
    edit_config(folder, dtype="bfloat16")
    assert (
        load_decoder(folder, "auto", "cpu").dtype == choose(ModelConfig.from_folder(folder), torch.device("cpu")).dtype
    )
    with pytest.raises(UsageError, match="int8"):
        load_decoder(folder, "int8", "cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_in_bfloat16_the_weights_take_the_memory_of_their_checkpoint(tmp_path, tied):
    save_tiny(tmp_path, tie_word_embeddings=tied)
    decoder = load_decoder(tmp_path, "bfloat16", "cpu")
    stored = load_file(tmp_path / "model.safetensors").values()
    assert decoder.bytes == sum(tensor.numel() * (4 if tensor.ndim == 1 else 2) for tensor in stored)  # norms are wide


def test_a_tied_head_follows_the_embedding_it_shares(tmp_path):
    save_tiny(tmp_path, tie_word_embeddings=True)
    decoder = load_decoder(tmp_path, "bfloat16", "cpu")
    hidden = torch.randn(3, decoder.config.hidden_size).bfloat16()
    before = decoder.logits(hidden)
    edit_weights(tmp_path, lambda weights: weights["model.embed_tokens.weight"].mul_(2))
    load_weights_into(decoder, tmp_path)
    assert torch.equal(decoder.logits(hidden), 2 * before)


def test_unknown_device_is_refused(folder):
    with pytest.raises(UsageError, match="quantum"):
        load_decoder(folder, "float32", "quantum")


def test_new_weights_replace_the_old_cast_to_the_compute_type(folder):
    decoder = load_decoder(folder, "bfloat16", "cpu")
    edit_weights(folder, lambda w: [t.add_(1.0) for t in w.values()])
    load_weights_into(decoder, folder)
    saved, loaded = load_file(folder / "model.safetensors"), decoder.tensors()
    assert saved.keys() == loaded.keys() == decoder.shapes.keys()
    for name, tensor in saved.items():
        kept = tensor if name.endswith("norm.weight") else tensor.bfloat16()
        assert torch.equal(loaded[name], kept), name


BAD_WEIGHTS = {
    "missing tensor": (lambda w: w.pop("model.norm.weight"), "model.norm.weight"),
    "misshaped tensor": (
        lambda w: w.update({"model.layers.1.mlp.down_proj.weight": torch.ones(3, 4)}),
        r"model.layers.1.mlp.down_proj.weight has shape \(3, 4\)",
    ),
    "unannounced bias": (
        lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}),
        "model.layers.0.self_attn.q_proj.bias has no place",
    ),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_are_named_and_change_nothing(folder, name):
    decoder = load_decoder(folder, "float32", "cpu")
    before = decoder.tensors()
    change, message = BAD_WEIGHTS[name]
    edit_weights(folder, lambda w: ([t.add_(1.0) for t in w.values()], change(w)))
    with pytest.raises(UsageError, match=message):
        load_weights_into(decoder, folder)
    assert all(torch.equal(before[key], tensor) for key, tensor in decoder.tensors().items())


def test_truncated_file_is_named_and_changes_nothing(folder):
    decoder = load_decoder(folder, "float32", "cpu")
    before = decoder.embedding.clone()
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for length in (len(content) - 100, 20, 0):
        path.write_bytes(content[:length])
        with pytest.raises(UsageError, match=r"model\.safetensors is truncated"):
            load_weights_into(decoder, folder)
    assert torch.equal(before, decoder.embedding)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(UsageError, match="nowhere does not exist"):
        load_decoder(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model\.safetensors is missing"):
        load_decoder(folder)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"model-00001-of-00002\.safetensors is missing"):
        load_decoder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match=r"config\.json is missing"):
        load_decoder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported are .*Qwen3ForCausalLM"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_key_value_heads": 4}, "not a multiple"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ],
)
def test_unusable_configuration_is_refused_with_its_value(folder, change, message):
    edit_config(folder, **change)
    with pytest.raises(UsageError, match=message):
        ModelConfig.from_folder(folder)


def test_older_rope_fields_are_read(folder):
    edit_config(folder, rope_parameters=None, rope_theta=123.0, rope_scaling={"type": "linear", "factor": 3.0})
    rope = ModelConfig.from_folder(folder).rope
    assert (rope.theta, rope.kind, rope.factor) == (123.0, "linear", 3.0)


def test_sliding_windows_are_read_as_transformers_reads_them(folder):
    def windows(**changes):
        edit_config(folder, **{"num_hidden_layers": 3, "layer_types": None, **changes})
        config = ModelConfig.from_folder(folder)
        return [config.window(layer) for layer in range(3)]

    everywhere = [UNLIMITED] * 3
    assert windows(sliding_window=100, use_sliding_window=False) == everywhere
    assert windows(sliding_window=None, use_sliding_window=True) == everywhere
    assert windows(sliding_window=100, use_sliding_window=True) == everywhere, "from layer 28 on"
    assert windows(max_window_layers=1) == [UNLIMITED, 100, 100]
    assert windows(layer_types=["sliding_attention", "full_attention", "full_attention"])[0] == 100
    assert windows(architectures=["LlamaForCausalLM"]) == everywhere
    assert windows(architectures=["MistralForCausalLM"], use_sliding_window=None) == [100] * 3
    assert ModelConfig.from_folder(folder).max_positions == 256
    with pytest.raises(UsageError, match="sliding_window 0"):
        windows(sliding_window=0)
    with pytest.raises(UsageError, match="layer_types"):
        windows(architectures=["Qwen3ForCausalLM"], sliding_window=9, use_sliding_window=True, layer_types=["linear"])
