"""The embedded model: a small Qwen3 with a character tokenizer, and the cache folder it is kept in."""

import os
import string
from pathlib import Path

from msgspec import Struct
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, EOS, UNKNOWN = "<|pad|>", "<|eos|>", "<|unk|>"
SPECIAL = (PAD, EOS, UNKNOWN)
PAD_ID, EOS_ID = 0, 1
CHARACTERS = "\n " + string.digits + string.ascii_letters + string.punctuation
MAX_POSITIONS = 1024


class Architecture(Struct, kw_only=True, frozen=True):
    """Shape of the embedded model; the defaults give 3.0 million parameters."""

    hidden_size: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    intermediate_size: int = 704


def build_model(architecture: Architecture) -> Qwen3ForCausalLM:
    """A model with fresh float32 weights from torch's global random state.

    Attention is written out: at these lengths that trains faster on a CPU than the fused kernel.
    """
    config = Qwen3Config(
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=architecture.hidden_size,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads,
        head_dim=architecture.head_dim,
        intermediate_size=architecture.intermediate_size,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        dtype="float32",
        eos_token_id=EOS_ID,
    )
    model = Qwen3ForCausalLM(config)
    model.set_attn_implementation("eager")
    return model


def build_tokenizer() -> Tokenizer:
    """One token a printable ASCII character or newline: byte-pair encoding without merges."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def save_model(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Write model and tokenizer as a Hugging Face checkpoint directory; the head is the embedding and not written."""
    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=True, temperature=1.0).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(),
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def cache_folder() -> Path:
    """Where embedded models are kept: `rollahead/embedded` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "rollahead" / "embedded"
