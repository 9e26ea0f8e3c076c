"""Random checkpoints of a stated shape: what a model costs does not depend on what it has learned."""

import re
from pathlib import Path

from pipeline.errors import UsageError

SHAPES = {
    "random-60m": (12, 512, 1536, 8, 2, 32_768),
    "random-1.5b": (28, 1536, 8960, 12, 2, 151_936),
    "random-7b": (28, 3584, 18_944, 28, 4, 152_064),
}
"""name -> layers, hidden, intermediate, heads, KV heads, vocabulary; the last two are Qwen2's 1.5B and 7B"""


def shape_of(name: str) -> tuple[int, int, int, int, int, int]:
    """Layers, hidden, intermediate, heads, KV heads and vocabulary of a name of `SHAPES` or random-LxHxV.

    Raises:
        UsageError: neither, or a shape that no model has.
    """
    match = re.fullmatch(r"random-(\d+)x(\d+)x(\d+)", name)
    if match:
        layers, hidden, vocabulary = map(int, match.groups())
        heads, kv_heads = max(1, hidden // 64), max(1, hidden // 256)
        if not layers or not hidden or hidden % (2 * heads) or heads % kv_heads or vocabulary < 16:
            raise UsageError(
                f"model {name} has no layers, a width that heads do not divide, or fewer than 16 tokens; give for "
                "example random-4x256x4096 (layers, width, vocabulary)"
            )
        return layers, hidden, 3 * hidden, heads, kv_heads, vocabulary
    if name not in SHAPES:
        raise UsageError(f"model {name} is neither a folder nor one of {', '.join(SHAPES)}, random-LxHxV (layers, ...)")
    return SHAPES[name]


def checkpoint(name: str, cache: Path) -> Path:
    """The folder of `name`: a folder is itself, a random model is made under `cache`.

    Raises:
        UsageError: neither a folder nor a shape.
    """
    if Path(name).is_dir():
        return Path(name)
    folder = cache / name
    shape = shape_of(name)
    if not (folder / "model.safetensors").exists():
        _make(folder, shape)
    return folder


def _make(folder: Path, shape: tuple[int, int, int, int, int, int]) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    layers, hidden, intermediate, heads, kv_heads, vocabulary = shape
    config = Qwen3Config(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=hidden // heads, vocab_size=vocabulary, tie_word_embeddings=True,
        max_position_embeddings=4096, eos_token_id=2, bos_token_id=1, pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.bfloat16().save_pretrained(folder, max_shard_size="100GB")
