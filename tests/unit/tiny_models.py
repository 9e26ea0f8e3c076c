"""Small random checkpoints, saved by transformers, for tests of the decoder and what runs on it."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from drafters.rehearsal import tiny_target

VOCABULARY = 61
MIMOS_LAYER = "model.mtp_layers.0."
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def save_tiny(folder: Path, family: str = "Qwen3", seed: int = 0, sharpness: float = 2.0, **overrides: Any) -> Path:
    """A checkpoint whose next-token entropy is like a language's: every weight random, norms and biases included, and
    matrices as wide as keeps activations of one size, so that rounding does not grow from layer to layer."""
    shape = {key: value for key, value in {**SHAPE, **overrides}.items() if value is not None}
    config = getattr(transformers, f"{family}Config")(**shape)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.2 * torch.randn_like(weight))
            else:
                weight.normal_(0, 0.2 * (SHAPE["hidden_size"] / config.hidden_size) ** 0.5)
        model.get_output_embeddings().weight.mul_(sharpness)
    model.save_pretrained(folder)
    return folder


def add_mimos_head(folder: Path) -> Path:
    """Makes a checkpoint of Qwen2's decoder one of MiMo's: one more layer, before it two norms and a projection."""
    text = (folder / "config.json").read_text().replace("Qwen2ForCausalLM", "MiMoForCausalLM")
    (folder / "config.json").write_text(text)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    last = f"model.layers.{max(int(n.split('.')[2]) for n in tensors if n.startswith('model.layers.'))}."
    for name in [n for n in tensors if n.startswith(last)]:
        tensors[MIMOS_LAYER + name.removeprefix(last)] = tensors[name].clone()
    width = tensors["model.norm.weight"].shape[0]
    for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        tensors[f"{MIMOS_LAYER}{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)
    tensors[f"{MIMOS_LAYER}input_proj.weight"] = torch.randn(width, 2 * width, generator=generator) / width**0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def save_like_the_kits(folder: Path, noise: float = 0.05) -> Path:
    """A checkpoint near the target of `drafters.rehearsal`: its drafts are often accepted, not always."""
    target, generator = tiny_target(), torch.Generator().manual_seed(0)
    tensors = {
        name: weight + noise * torch.randn(weight.shape, generator=generator)
        for name, weight in target.tensors().items()
    }
    c = target.config
    transformers.Qwen3Config(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim,
        max_position_embeddings=c.max_positions, tie_word_embeddings=True, architectures=[c.architecture],
        bos_token_id=c.bos_token_id, eos_token_id=list(c.eos_token_ids),
    ).save_pretrained(folder)  # fmt: skip
    save_file(tensors, folder / "model.safetensors")
    return folder


def reference(folder: Path) -> transformers.PreTrainedModel:
    """The same checkpoint in transformers, float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def reference_logits(model: transformers.PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """float32 [T, V] of one sequence, without padding or cache."""
    return model(torch.tensor([token_ids])).logits[0].float()
