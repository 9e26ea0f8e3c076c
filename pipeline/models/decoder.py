"""A lean decoder for the Llama / Mistral / Qwen2 / Qwen3 family, equal to transformers' logits on the same weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.models.attention import Attention, CPUAttention, attention_for
from pipeline.models.config import ModelConfig
from pipeline.models.kv_cache import AttentionPlan, KVCache
from pipeline.models.linear import Linear

if TYPE_CHECKING:
    from pipeline.models.cpu_layers import CompiledLayers


@dataclass(slots=True)
class Layer:
    """A block (D head dimension)."""

    input_norm: Tensor
    qkv: Linear
    """to (heads + 2 kv_heads) D"""
    qk_norm: Tensor | None
    """[2, D]: of queries, of keys"""
    output: Linear
    post_norm: Tensor
    gate: Linear
    up: Linear
    down: Linear


class LayerWeights:
    """What a model of such blocks is made of: weights by the checkpoint's names on one device, zeros until `load`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self._plain: dict[str, Tensor] = {}
        """weights that are no matrix product's, by the checkpoint's name"""
        self._linears: list[Linear] = []
        self.layers: list[Layer] = []
        """from the first to the last"""
        self.attention = attention_for(config, dtype, device)
        self._compiled: CompiledLayers | None = None
        self.most_compiled_rows: int | None = None
        """rows up to which a CPU computes all layers in one compiled call; None: measured when first asked"""

    def _norm_weight(self, name: str, *shape: int) -> Tensor:
        # The CPU's kernels read it in float32, so that the normalised row is rounded once, not twice.
        dtype = torch.float32 if self.device.type == "cpu" else self.dtype
        self._plain[name] = weight = torch.zeros(*shape, dtype=dtype, device=self.device)
        return weight

    def _linear(self, weights: dict[str, int], inputs: int, bias: bool = False, tied: Tensor | None = None) -> Linear:
        linear = Linear(weights, inputs, self.dtype, self.device, bias=bias, tied=tied)
        self._linears.append(linear)
        return linear

    def _layer(self, prefix: str) -> Layer:
        c, attention, feed_forward = self.config, prefix + "self_attn.", prefix + "mlp."
        hidden, queries, keys = c.hidden_size, c.heads * c.head_dim, c.kv_heads * c.head_dim
        qkv = {attention + "q_proj": queries, attention + "k_proj": keys, attention + "v_proj": keys}
        qk_norm = None
        if c.qk_norm:
            qk_norm = self._norm_weight(attention + "qk_norm", 2, c.head_dim)
            del self._plain[attention + "qk_norm"]
            self._plain[attention + "q_norm.weight"], self._plain[attention + "k_norm.weight"] = qk_norm
        layer = Layer(
            input_norm=self._norm_weight(prefix + "input_layernorm.weight", hidden),
            qkv=self._linear(qkv, hidden, c.qkv_bias),
            qk_norm=qk_norm,
            output=self._linear({attention + "o_proj": hidden}, queries, c.output_bias),
            post_norm=self._norm_weight(prefix + "post_attention_layernorm.weight", hidden),
            gate=self._linear({feed_forward + "gate_proj": c.intermediate_size}, hidden),
            up=self._linear({feed_forward + "up_proj": c.intermediate_size}, hidden),
            down=self._linear({feed_forward + "down_proj": hidden}, c.intermediate_size),
        )
        self.layers.append(layer)
        return layer

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every checkpoint tensor the decoder needs."""
        shapes = {name: tuple(weight.shape) for name, weight in self._plain.items()}
        for linear in self._linears:
            shapes |= linear.shapes
        return shapes

    @property
    def loads(self) -> list[str]:
        """Names in the order in which `load` asks for tensors; a tied head's that is packed is asked for again."""
        return [*self._plain, *(name for linear in self._linears for name in linear.loads)]

    @torch.no_grad()
    def load(self, tensor: Callable[[str], Tensor]) -> None:
        """Overwrites every weight with the tensor of its name, cast to the compute type."""
        self._compiled = None  # it knows where the old ones lie, and is made anew only when all are there
        for name, weight in self._plain.items():
            weight.copy_(tensor(name))
        for linear in self._linears:
            linear.load(tensor)
        self._compile()

    def _compile(self) -> None:
        if isinstance(self.attention, CPUAttention) and self.dtype == torch.bfloat16:
            from pipeline.models.cpu_layers import CompiledLayers

            self._compiled = CompiledLayers.of(self.config, self.layers, self.attention.rope)

    @property
    def compiled(self) -> "CompiledLayers | None":
        """The layers as one compiled call; another one after every `load`."""
        return self._compiled

    def takes_compiled(self, rows: int) -> bool:
        """Whether the compiled pass is faster for so many rows."""
        if self._compiled is None:
            return False
        if self.most_compiled_rows is None:
            from pipeline.models.precision import most_compiled_rows

            self.most_compiled_rows = most_compiled_rows(self.config, torch.get_num_threads())
        return rows <= self.most_compiled_rows

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all weights by the checkpoint's names, as they are computed with."""
        found = {name: weight.clone() for name, weight in self._plain.items()}
        for linear in self._linears:
            found |= linear.tensors()
        return found

    @property
    def bytes(self) -> int:
        """Of all weights in memory."""
        plain = sum(weight.numel() * weight.element_size() for weight in self._plain.values())
        return plain + sum(linear.bytes for linear in self._linears)

    def through(
        self, index: int, layer: Layer, x: Tensor, plan: AttentionPlan, cache: KVCache, attention: Attention
    ) -> Tensor:
        """[N, H] after a layer; its new keys and values are cached as layer `index`'s, if `attention` does that."""
        if attention is self.attention and self.takes_compiled(len(x)):
            assert self._compiled is not None
            rows = x.clone(memory_format=torch.contiguous_format)
            return self._compiled(rows, plan, cache, [index])
        qkv = layer.qkv(attention.norm(x, layer.input_norm))
        x = layer.output.plus(attention(index, qkv, layer.qk_norm, plan, cache), x)
        normed = attention.norm(x, layer.post_norm)
        return layer.down.plus(layer.up.times(normed, layer.gate.silu(normed)), x)


class Decoder(LayerWeights):
    """The model, and its forward pass over packed tokens."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, dtype, device)
        self.source: Path | None = None
        """folder that the weights were last loaded from; None: they did not come as files"""
        self.beside: dict[str, Tensor] = {}
        """Tensors that came beside weights that did not come as files: of a draft head, say. Kept while new weights are
        made known."""
        self.embedding = torch.zeros(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self._plain["model.embed_tokens.weight"] = self.embedding
        for i in range(config.layers):
            self._layer(f"model.layers.{i}.")
        self.final_norm = self._norm_weight("model.norm.weight", config.hidden_size)
        # On a CPU a tied head in float32 has a copy of its own, packed for the matrix product.
        name, tied = ("model.embed_tokens", self.embedding) if config.tied_head else ("lm_head", None)
        self.head = self._linear({name: config.vocab_size}, config.hidden_size, tied=tied)
        self._compiled_head = False

    @property
    def read_bytes(self) -> int:
        """Of the weights that a forward pass reads whole: of the embedding it reads rows."""
        embedding = self.embedding.numel() * self.embedding.element_size()
        shared = self.config.tied_head and self.head.bytes == 0
        return self.bytes - (0 if shared else embedding)

    @torch.no_grad()
    def forward(
        self,
        token_ids: Tensor,
        plan: AttentionPlan,
        cache: KVCache,
        states: list[Tensor] | None = None,
        attention: Attention | None = None,
        only: Sequence[int] | None = None,
    ) -> Tensor:
        """Hidden states [N, H] after the final norm of packed tokens int64 [N].

        Args:
            token_ids: N packed tokens.
            plan: of this forward pass.
            cache: read and written.
            states: filled with [N, H] tensors, the embedding and what each layer gave, where it is a list.
            attention: stands in for the decoder's own, and need not cache keys and values.
            only: layers that are computed, in this order; None: all.
        """
        attention, x = attention or self.attention, self.embedding[token_ids]
        if attention is self.attention and self.takes_compiled(len(x)):
            assert self._compiled is not None
            kept = None
            if states is not None:
                kept = x.new_empty(len(self.layers if only is None else only) + 1, *x.shape)
                states.extend(kept)
            return self._compiled(x, plan, cache, only, self.final_norm, kept)
        if states is not None:
            states.append(x)
        for index in range(len(self.layers)) if only is None else only:
            x = self.through(index, self.layers[index], x, plan, cache, attention)
            if states is not None:
                states.append(x)
        return attention.norm(x, self.final_norm)

    @torch.no_grad()
    def block(self, index: int, x: Tensor, plan: AttentionPlan, cache: KVCache) -> Tensor:
        """[N, H] of [N, H]: one layer; its keys and values are cached."""
        return self.through(index, self.layers[index], x, plan, cache, self.attention)

    @property
    def has_compiled_head(self) -> bool:
        """Whether compiled passes can compute logits."""
        return self._compiled_head

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [M, V] of hidden states [M, H]."""
        return self.normed_logits(hidden, None)

    @torch.no_grad()
    def normed_logits(self, hidden: Tensor, norm: Tensor | None) -> Tensor:
        """float32 [M, V] of rows [M, H] that a norm of this weight [H], if any, comes before."""
        if self.takes_compiled(len(hidden)) and self._compiled_head:
            from pipeline.models.cpu_layers import product

            return product(hidden, self.head, norm, self.config.rms_norm_eps)
        return self.head(hidden if norm is None else self.attention.norm(hidden, norm)).float()

    def _compile(self) -> None:
        super()._compile()
        self._compiled_head = False
        if self._compiled is not None:
            from pipeline.models.cpu_layers import takes_product

            self._compiled_head = takes_product(self.head)
