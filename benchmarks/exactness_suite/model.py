"""Random checkpoints with entropies of a language model, and what they say of a text without any cache."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

STOP = 2
"""end-of-text id of the random models"""


def random_checkpoint(
    folder: Path, vocabulary: int, *, sharpness: float, seed: int = 0, head_dim: int = 8, tied: bool = False
) -> Path:
    """A two-layer Qwen3 checkpoint in float32; logits have about `sharpness` as standard deviation."""
    config = transformers.Qwen3Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=256, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=STOP,
    )  # fmt: skip
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.Qwen3ForCausalLM(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(0, 0.2)
            model.get_output_embeddings().weight.normal_(0, sharpness / 32**0.5)
    model.save_pretrained(folder)
    return folder


class FreshForward:
    """The same checkpoint in transformers, float32: every call computes a whole text anew."""

    def __init__(self, folder: Path) -> None:
        transformers.utils.logging.disable_progress_bar()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()
        self.vocabulary = int(self._model.config.vocab_size)

    @torch.no_grad()
    def logits(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """float64 [B, L, V] of B texts of L tokens each."""
        found: np.ndarray = self._model(torch.tensor(texts)).logits.double().numpy()
        return found
