"""Small random checkpoints, saved by transformers, for tests of the decoder and what runs on it."""

from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 61
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


def reference(folder: Path) -> transformers.PreTrainedModel:
    """The same checkpoint in transformers, float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def reference_logits(model: transformers.PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """float32 [T, V] of one sequence, without padding or cache."""
    return model(torch.tensor([token_ids])).logits[0].float()
