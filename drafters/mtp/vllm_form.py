"""A head in the form in which vLLM runs it: as the multi-token-prediction layer of a GLM-4.5 checkpoint.

Of vLLM's classes for such heads `Glm4MoeMTP` is the one that computes what `drafters.mtp.head` does: attention with
optional norms of queries and keys and any head width, h' going round before the final norm, an embedding of zero at
position 0. Its feed-forward block is a mixture of experts. A dense block is one as well: the shared expert has half of
the intermediate neurons, and two routed experts, both always chosen, a quarter each. With a router of zeros they have
weight 1/2, which `routed_scaling_factor` 2 makes 1.
"""

from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from drafters.mtp.head import PREFIX, head_files, is_mimos
from drafters.mtp.head import head_tensors as read
from drafters.mtp.module import MTPModule
from pipeline.errors import UsageError
from pipeline.models.config import ModelConfig

EXPERTS, SHARED = 2, 2
"""routed, and how many times a routed one's neurons the shared one has"""
_RENAMED = {
    "fc.": "eh_proj.",
    "pre_fc_norm_embedding.": "enorm.",
    "pre_fc_norm_hidden.": "hnorm.",
    "norm.": "shared_head.norm.",
    "layers.0.": "",
}


def vllm_tensors(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A head's tensors under GLM's names.

    Args:
        tensors: by our names; others than `mtp.*` are left out.
        layers: of the target; the head comes after them.
    """
    prefix, found = f"model.layers.{layers}.", {}
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX):
            continue
        own = name.removeprefix(PREFIX)
        old = next(old for old in _RENAMED if own.startswith(old))
        renamed = prefix + _RENAMED[old] + own.removeprefix(old)
        part, projection, weight = renamed.partition("mlp.")
        if not projection:
            found[renamed] = tensor.contiguous()
            continue
        neurons = 1 if weight.startswith("down_proj") else 0
        shares = tensor.chunk(EXPERTS + SHARED, dim=neurons)
        found[f"{part}mlp.shared_experts.{weight}"] = torch.cat(shares[EXPERTS:], neurons)
        for expert in range(EXPERTS):
            found[f"{part}mlp.experts.{expert}.{weight}"] = shares[expert].contiguous()
    hidden = found[prefix + "enorm.weight"].shape[0]
    found[prefix + "mlp.gate.weight"] = torch.zeros(EXPERTS, hidden)
    found[prefix + "mlp.gate.e_score_correction_bias"] = torch.zeros(EXPERTS)
    return found


def vllm_config(model: Path) -> dict[str, Any]:
    """`config.json` of the head for the checkpoint in `model`.

    Raises:
        UsageError: a checkpoint that the native decoder cannot read, or whose layers are not those of vLLM's class.
    """
    config = ModelConfig.from_folder(model)
    if config.output_bias:
        raise UsageError(
            f"{model}: attention_bias true gives the output projection a bias, which no head in vLLM has; use the "
            "native generator for drafter mtp"
        )
    if config.intermediate_size % (EXPERTS + SHARED):
        raise UsageError(
            f"{model}: intermediate_size {config.intermediate_size} is no multiple of {EXPERTS + SHARED} and does not "
            "divide among experts; use the native generator for drafter mtp"
        )
    file = msgspec.json.decode((model / "config.json").read_bytes())
    rope = dict(file.get("rope_parameters") or file.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "attention_bias": config.qkv_bias,
        "dtype": config.dtype,
        "first_k_dense_replace": 0,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "moe_intermediate_size": config.intermediate_size // (EXPERTS + SHARED),
        "n_group": 1,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": SHARED,
        "norm_topk_prob": True,
        "num_attention_heads": config.heads,
        "num_experts_per_tok": EXPERTS,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {**rope, "rope_theta": config.rope.theta, "partial_rotary_factor": 1.0},
        "routed_scaling_factor": float(EXPERTS),
        "tie_word_embeddings": config.tied_head,
        "topk_group": 1,
        "use_qk_norm": config.qk_norm,
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
    if is_mimos(files):
        raise UsageError(
            f'{head} holds a head of MiMo\'s, which vLLM runs as it is: engine.drafter = "none" and '
            'engine.vllm.speculative_config = {method = "mtp", num_speculative_tokens = 1}'
        )
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
    if out.exists():
        raise UsageError(f"--out {out} exists already; choose a new folder")
    try:
        out.mkdir(parents=True)
        (out / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2))
        save_file(vllm_tensors(tensors, config["num_hidden_layers"]), out / "model.safetensors", {"format": "pt"})
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error}") from error
