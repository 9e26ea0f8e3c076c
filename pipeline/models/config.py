"""What a Hugging Face `config.json` says about a decoder, checked and reduced to what the forward pass needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, field

from pipeline.errors import UsageError

UNLIMITED = 1 << 40
"""A window that no sequence fills."""


@dataclass(frozen=True, slots=True)
class Family:
    """How an architecture differs from Llama's decoder."""

    qk_norm: bool = False
    qkv_bias: bool = False
    """query, key and value projections have a bias whatever `attention_bias` says"""
    window: str = "never"
    """`sliding_window` of the configuration holds for: never, "all" layers, or "some" if `use_sliding_window`"""


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MiMoForCausalLM": Family(qkv_bias=True, window="some"),
    "MistralForCausalLM": Family(window="all"),
    "Qwen2ForCausalLM": Family(qkv_bias=True, window="some"),
    "Qwen3ForCausalLM": Family(qk_norm=True, window="some"),
}


@dataclass(frozen=True, slots=True)
class RopeParameters:
    """Rotary embedding: base, and the frequency scaling of long-context variants."""

    theta: float = 10_000.0
    kind: str = "default"
    """default, linear or llama3"""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer with rotary positions, grouped-query attention and a SwiGLU feed-forward block."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeParameters
    tied_head: bool
    qk_norm: bool
    qkv_bias: bool
    output_bias: bool
    """the attention's output projection has a bias"""
    max_positions: int
    dtype: str
    """of the checkpoint: float32, bfloat16 or float16"""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    windows: tuple[int, ...] = ()
    """for each layer, how many keys up to itself a query sees, `UNLIMITED` for all; none given: all in all layers"""

    def window(self, layer: int) -> int:
        """Keys up to itself that a query of the layer sees."""
        return self.windows[layer] if self.windows else UNLIMITED

    @staticmethod
    def from_folder(folder: str | Path) -> "ModelConfig":
        """Reads `config.json` and, for the end-of-text ids, `generation_config.json` where there is one.

        Raises:
            UsageError: the folder or file is missing or broken, or the model is of a kind the decoder cannot run.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UsageError(f"model folder {folder} does not exist; give a Hugging Face checkpoint directory")
        path = folder / "config.json"
        # first of all, since files of other families lack the fields of ours
        family = _family(_read(path, _Architectures).architectures, path)
        file = _read(path, _ConfigFile)
        _check_feed_forward(file, path)
        heads, kv_heads = file.num_attention_heads, file.num_key_value_heads or file.num_attention_heads
        if heads < 1 or heads % kv_heads:
            raise UsageError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        generation = folder / "generation_config.json"
        eos = _read(generation, _GenerationFile).eos_token_id if generation.exists() else None
        return ModelConfig(
            architecture=file.architectures[0],
            vocab_size=file.vocab_size,
            hidden_size=file.hidden_size,
            intermediate_size=file.intermediate_size,
            layers=file.num_hidden_layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=file.head_dim or file.hidden_size // heads,
            rms_norm_eps=file.rms_norm_eps,
            rope=_rope(file, path),
            tied_head=file.tie_word_embeddings,
            qk_norm=family.qk_norm,
            qkv_bias=family.qkv_bias or file.attention_bias,
            output_bias=file.attention_bias,
            max_positions=file.max_position_embeddings,
            dtype=(file.dtype or file.torch_dtype or "float32").removeprefix("torch."),
            bos_token_id=file.bos_token_id,
            eos_token_ids=_ids(eos) or _ids(file.eos_token_id),
            windows=_windows(file, family, path),
        )


class _Architectures(Struct):
    architectures: list[str] | None = None


class _ConfigFile(Struct):
    architectures: list[str]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    sliding_window: int | None = None
    use_sliding_window: bool | None = None
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None


class _GenerationFile(Struct):
    eos_token_id: int | list[int] | None = None


class _RopeFields(Struct):
    """`rope_parameters` of transformers 5, or `rope_scaling` beside `rope_theta` of older files."""

    rope_theta: float | None = None
    rope_type: str = ""
    type: str = ""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    partial_rotary_factor: float = field(default=1.0)


def _read(path: Path, kind: type[Struct]) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise UsageError(f"{path} is missing; give a Hugging Face checkpoint directory") from None
    except msgspec.MsgspecError as error:
        raise UsageError(f"{path} cannot be used: {error}") from None


def _family(architectures: list[str] | None, path: Path) -> Family:
    name = architectures[0] if architectures else "none"
    if name not in FAMILIES:
        raise UsageError(f"{path}: architecture {name} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def _check_feed_forward(file: _ConfigFile, path: Path) -> None:
    if file.hidden_act != "silu":
        raise UsageError(f"{path}: hidden_act {file.hidden_act!r} is not supported; supported is 'silu'")
    if file.mlp_bias:
        raise UsageError(f"{path}: mlp_bias true is not supported; use a model without biases in its feed-forward")


def _rope(file: _ConfigFile, path: Path) -> RopeParameters:
    try:
        fields = msgspec.convert(file.rope_parameters or file.rope_scaling or {}, _RopeFields)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: rope parameters cannot be used: {error}") from None
    kind = fields.rope_type or fields.type or "default"
    if kind not in ("default", "linear", "llama3") or fields.partial_rotary_factor != 1.0:
        what = kind if fields.partial_rotary_factor == 1.0 else f"partial_rotary_factor {fields.partial_rotary_factor}"
        raise UsageError(
            f"{path}: rope {what} is not supported; supported are default, linear, llama3 over whole heads"
        )
    return RopeParameters(
        theta=fields.rope_theta or file.rope_theta or 10_000.0,
        kind=kind,
        factor=fields.factor,
        low_freq_factor=fields.low_freq_factor,
        high_freq_factor=fields.high_freq_factor,
        original_max_positions=fields.original_max_position_embeddings,
    )


def _windows(file: _ConfigFile, family: Family, path: Path) -> tuple[int, ...]:
    """Of each layer, as transformers reads the file: Mistral's window holds everywhere, Qwen's from some layer on."""
    window = file.sliding_window
    if window is None or family.window == "never" or (family.window == "some" and not file.use_sliding_window):
        return ()
    if window < 1:
        raise UsageError(f"{path}: sliding_window {window} must be at least 1")
    if family.window == "all":
        return (window,) * file.num_hidden_layers
    kinds = file.layer_types or [
        "sliding_attention" if layer >= file.max_window_layers else "full_attention"
        for layer in range(file.num_hidden_layers)
    ]
    if len(kinds) != file.num_hidden_layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise UsageError(
            f"{path}: layer_types {kinds} must name sliding_attention or full_attention for each of "
            f"{file.num_hidden_layers} layers"
        )
    return tuple(window if kind == "sliding_attention" else UNLIMITED for kind in kinds)


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
