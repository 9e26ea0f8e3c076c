"""A lean decoder for the Llama / Mistral / Qwen2 / Qwen3 family, equal to transformers' logits on the same weights.

Queries, keys and values come from one projection, as do gate and up; the tensors a checkpoint names are views of them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.models.kv_cache import AttentionPlan, KVCache
from pipeline.models.rope import RopeTable, rotate


@dataclass(slots=True)
class Layer:
    """Weights of a block (H hidden size, D head dimension)."""

    input_norm: Tensor
    qkv: Tensor
    """[(heads + 2 kv_heads) D, H]"""
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    """[2, D]: of queries, of keys"""
    output: Tensor
    """[H, heads D]"""
    output_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    """[2 intermediate, H]"""
    down: Tensor
    """[H, intermediate]"""


class Decoder:
    """Weights on one device, and the forward pass over packed tokens.

    `tensors` maps the checkpoint's names to views of the weights, so writing through it changes what is computed.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.tensors: dict[str, Tensor] = {}
        self.embedding = self._new("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.layers = [self._layer(f"model.layers.{i}.") for i in range(config.layers)]
        self.final_norm = self._new("model.norm.weight", config.hidden_size)
        self.head = self.embedding
        if not config.tied_head:
            self.head = self._new("lm_head.weight", config.vocab_size, config.hidden_size)
        self._norm_rows = torch.tensor([0] * config.heads + [1] * config.kv_heads, device=device)
        self._rope = RopeTable(config.rope, config.head_dim, dtype, device)

    def _new(self, name: str, *shape: int) -> Tensor:
        self.tensors[name] = tensor = torch.empty(*shape, dtype=self.dtype, device=self.device)
        return tensor

    def _fused(self, prefix: str, suffix: str, parts: dict[str, int], *inner: int) -> Tensor:
        """One tensor of the parts' rows; each part is known by the checkpoint's name for it."""
        tensor = torch.empty(sum(parts.values()), *inner, dtype=self.dtype, device=self.device)
        for name, view in zip(parts, tensor.split(list(parts.values())), strict=True):
            self.tensors[prefix + name + suffix] = view
        return tensor

    def _layer(self, prefix: str) -> Layer:
        c = self.config
        hidden, queries, keys = c.hidden_size, c.heads * c.head_dim, c.kv_heads * c.head_dim
        attention, feed_forward = prefix + "self_attn.", prefix + "mlp."
        qkv = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        gate_up = {"gate_proj": c.intermediate_size, "up_proj": c.intermediate_size}
        qk_norm = None
        if c.qk_norm:
            qk_norm = torch.empty(2, c.head_dim, dtype=self.dtype, device=self.device)
            self.tensors[attention + "q_norm.weight"], self.tensors[attention + "k_norm.weight"] = qk_norm
        return Layer(
            input_norm=self._new(prefix + "input_layernorm.weight", hidden),
            qkv=self._fused(attention, ".weight", qkv, hidden),
            qkv_bias=self._fused(attention, ".bias", qkv) if c.qkv_bias else None,
            qk_norm=qk_norm,
            output=self._new(attention + "o_proj.weight", hidden, queries),
            output_bias=self._new(attention + "o_proj.bias", hidden) if c.output_bias else None,
            post_norm=self._new(prefix + "post_attention_layernorm.weight", hidden),
            gate_up=self._fused(feed_forward, ".weight", gate_up, hidden),
            down=self._new(feed_forward + "down_proj.weight", hidden, c.intermediate_size),
        )

    @torch.no_grad()
    def forward(self, token_ids: Tensor, plan: AttentionPlan, cache: KVCache) -> Tensor:
        """Hidden states [N, H] after the final norm of packed tokens int64 [N]; their keys and values are cached."""
        x = self.embedding[token_ids]
        cos, sin = self._rope.at(plan.positions, plan.keys)
        for index, layer in enumerate(self.layers):
            x = x + self._attention(index, self._norm(x, layer.input_norm), cos, sin, plan, cache)
            gate, up = F.linear(self._norm(x, layer.post_norm), layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return self._norm(x, self.final_norm)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [M, V] of hidden states [M, H]."""
        return F.linear(hidden, self.head).float()

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

    def _attention(
        self, index: int, x: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan, cache: KVCache
    ) -> Tensor:
        c, layer = self.config, self.layers[index]
        qkv = F.linear(x, layer.qkv, layer.qkv_bias).view(len(x), -1, c.head_dim)
        qk = qkv[:, : c.heads + c.kv_heads]
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (c.head_dim,), None, c.rms_norm_eps) * layer.qk_norm[self._norm_rows]
        qk = rotate(qk, cos, sin)
        cache.write(index, plan, qk[:, c.heads :], qkv[:, c.heads + c.kv_heads :])
        attended = self._attend(qk[:, : c.heads], plan, *cache.read(index, plan))
        return F.linear(attended, layer.output, layer.output_bias)

    def _attend(self, queries: Tensor, plan: AttentionPlan, keys: Tensor, values: Tensor) -> Tensor:
        """[N, heads * D]. A KV head's query heads become further queries of it, so no key is repeated in memory."""
        c, flat = self.config, queries.flatten(1)
        rows, width, group = plan.rows, plan.width, c.heads // c.kv_heads
        if plan.pad_index is not None:
            flat = flat.new_zeros(rows * width, flat.shape[1]).index_copy_(0, plan.pad_index, flat)
        folded = flat.view(rows, width, c.kv_heads, group, c.head_dim).transpose(1, 2).flatten(2, 3)
        attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=plan.mask)
        flat = attended.unflatten(2, (width, group)).transpose(1, 2).reshape(rows * width, -1)
        return flat if plan.pad_index is None else flat[plan.pad_index]
