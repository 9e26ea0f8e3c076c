"""The trained policy: a transformers causal language model with float32 master weights."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.logging import disable_progress_bar

from learner import ranks
from learner.attention import PACKED_ATTENTION
from learner.lean import keep_less
from learner.linear import use_fast_products
from pipeline.errors import UsageError
from pipeline.models.checkpoint import compute_device
from pipeline.weights import COMPANION_FILES

_UNSUPPORTED = ("final_logit_softcapping", "attn_logit_softcapping", "logits_scaling", "logit_scale")


def resolve_device(device: str) -> torch.device:
    """The device that `learner.device` names; "auto" is CUDA where there is one, of several GPUs this rank's.

    Raises:
        UsageError: no such device here.
    """
    resolved = compute_device(device, "learner.device")
    if resolved == torch.device("cuda"):
        return compute_device(f"cuda:{ranks.local_rank()}", "learner.device")
    return resolved


def load_policy(folder: Path | str, device: str = "auto") -> PreTrainedModel:
    """Load a Hugging Face checkpoint for training: float32, evaluation mode (no dropout), packed attention.

    Raises:
        UsageError: no checkpoint there, weights missing or of another shape, or an architecture whose logits the
            learner does not compute.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is no Hugging Face checkpoint: it has no config.json; check model.path")
    disable_progress_bar()
    try:
        _refuse_unsupported(AutoConfig.from_pretrained(folder, local_files_only=True), folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation=PACKED_ATTENTION,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"the checkpoint {folder} cannot be loaded: {reason}") from error
    model, info = loaded
    # transformers fills missing weights with random numbers and goes on; a policy must not.
    missing = sorted(info["missing_keys"])
    if missing:
        raise UsageError(f"the checkpoint {folder} lacks {len(missing)} weights, {missing[0]} first; is it complete?")
    policy: PreTrainedModel = model.eval()
    keep_less(policy)
    policy = ranks.shard(policy, resolve_device(device))
    use_fast_products(policy)
    return policy


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the inputs of the layers for the backward pass, and compute each layer again in it.

    transformers does that in training mode alone, which is set on the layers themselves and on nothing inside them: no
    dropout.
    """
    # renamed in transformers 5.19
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False, "preserve_rng_state": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def policy_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's weights under the names of a Hugging Face checkpoint, tied weights once; detached, not copied."""
    tied: dict[str, str] = model.all_tied_weights_keys
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in tied}


def gathered_state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`policy_state` on the CPU in that type, whole on rank 0 and nothing on the others, which never hold more than one
    whole tensor. All ranks call it."""
    found = {}
    for name, tensor in policy_state(model).items():
        whole = ranks.full(tensor.to(dtype))
        if ranks.rank() == 0:
            found[name] = whole.cpu().contiguous()
    return found


def copy_companion_files(source: Path | str, target: Path) -> None:
    """Copy the tokenizer's files and the generation defaults, those that the source has."""
    for name in COMPANION_FILES:
        file = Path(source) / name
        if file.is_file():
            shutil.copyfile(file, target / name)


def _refuse_unsupported(config: PretrainedConfig, folder: Path) -> None:
    for key in _UNSUPPORTED:
        value = getattr(config, key, None)
        if value not in (None, 1, 1.0):
            raise UsageError(f"the checkpoint {folder} has {key} {value}, which the learner does not compute")
