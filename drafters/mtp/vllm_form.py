"""A head as a checkpoint of its own, which vLLM runs as the model of its method "mtp".

The tensors have our names; `config.json` says what the target's says, for one layer. `pipeline.engine.vllm.head_model`
is the class for it.
"""

from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from drafters.mtp.head import head_files, is_mimos
from drafters.mtp.head import head_tensors as read
from drafters.mtp.module import MTPModule
from pipeline.errors import UsageError
from pipeline.models.config import ModelConfig

ARCHITECTURE = "RollaheadMTP"
MODEL_TYPE = "mtp"
"""one by which vLLM knows models of that method"""
MIMO = "MiMoForCausalLM"


def vllm_config(model: Path) -> dict[str, Any]:
    """`config.json` of a head for the checkpoint in `model`, without how the head feeds itself.

    Raises:
        UsageError: a checkpoint that the native decoder cannot read, or whose layers are not those of vLLM's class.
    """
    config = ModelConfig.from_folder(model)
    if config.output_bias:
        raise UsageError(
            f"{model}: attention_bias true gives the output projection a bias, which no head in vLLM has; use the "
            "native generator for drafter mtp"
        )
    file = msgspec.json.decode((model / "config.json").read_bytes())
    rope = dict(file.get("rope_parameters") or file.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "attention_bias": config.qkv_bias,
        "dtype": config.dtype,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "num_attention_heads": config.heads,
        "num_hidden_layers": 1,
        "num_key_value_heads": config.kv_heads,
        "qk_norm": config.qk_norm,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {**rope, "rope_theta": config.rope.theta},
        "tie_word_embeddings": config.tied_head,
        "vocab_size": config.vocab_size,
    }


def head_tensors(model: Path, head: Path) -> dict[str, Tensor]:
    """A head's tensors by our names, checked against the model it is for.

    Raises:
        UsageError: there is no head, or it does not fit the model.
    """
    files = head_files(head)
    if not files:
        raise UsageError(f"{head} holds no multi-token-prediction head; train one with rollahead train-drafter")
    tensors = read(files)
    with torch.device("meta"):
        needed = {n: tuple(t.shape) for n, t in MTPModule(ModelConfig.from_folder(model)).weights().items()}
    for name in sorted(needed.keys() | tensors.keys()):
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape != needed.get(name):
            raise UsageError(
                f"the multi-token-prediction head in {head} does not fit the model in {model}: {name} has shape "
                f"{shape} where {needed.get(name)} is needed"
            )
    return tensors


def write_for_vllm(model: Path, head: Path, out: Path) -> None:
    """A folder that vLLM takes as `model` of `speculative_config` with `method` "mtp".

    Embedding and output head are not in it: vLLM's proposer takes the target's.

    Args:
        model: checkpoint directory of the target.
        head: folder of the head, the model's or its own.
        out: must not exist.

    Raises:
        UsageError: no head, one that does not fit, a model of a kind for which vLLM has none, or `out` exists.
    """
    config, tensors = vllm_config(model), head_tensors(model, head)
    config["normed_goes_round"] = mimos = is_mimos(head_files(head))
    if mimos != (ModelConfig.from_folder(model).architecture == MIMO):
        raise UsageError(
            f"{head} holds a head {'of' if mimos else 'that is not of'} MiMo's kind and {model} is "
            f"{'no' if mimos else 'a'} MiMo, whose hidden states vLLM hands out before the final norm; use the native "
            "generator for drafter mtp"
        )
    if out.exists():
        raise UsageError(f"--out {out} exists already; choose a new folder")
    try:
        out.mkdir(parents=True)
        (out / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2))
        save_file({n: t.contiguous() for n, t in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error}") from error
