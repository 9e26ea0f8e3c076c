"""From fused queries, keys and values of new tokens to what they attended to: for any device in torch, and on a CPU in
compiled kernels."""

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.models.kv_cache import AttentionPlan, KVCache
from pipeline.models.rope import RopeTable, rotate

_WORTH_SHARING = 8192
"""Queries times keys (some 20 microseconds of work) from which on several threads attend."""


class Attention(Protocol):
    """Normalises and attends; one for all layers, made for one model on one device."""

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm [N, H]."""

    def __call__(self, layer: int, qkv: Tensor, qk_norm: Tensor | None, plan: AttentionPlan, cache: KVCache) -> Tensor:
        """[N, heads * D] of qkv [N, (heads + 2 kv_heads) D]; the new keys and values are cached.

        Args:
            layer: index in the cache.
            qkv: of N packed tokens.
            qk_norm: [2, D] norm weights of queries and of keys (Qwen3).
            plan: of this forward pass.
            cache: read and written.
        """


def attention_for(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Attention:
    """The fastest for a model on a device."""
    if device.type == "cpu" and CPUAttention.takes(config):
        return CPUAttention(config, dtype, device)
    return TorchAttention(config, dtype, device)


class TorchAttention:
    """`torch.nn.functional.scaled_dot_product_attention`, rows padded to the widest."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._norm_rows = torch.tensor([0] * config.heads + [1] * config.kv_heads, device=device)
        self._rope = RopeTable(config.rope, config.head_dim, dtype, device)
        self._plan: AttentionPlan | None = None
        self._windows = {config.window(layer) for layer in range(config.layers)}
        self._masks: dict[int, Tensor] = {}
        """of `_plan`, by window"""

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), self._config.rms_norm_eps)

    def __call__(self, layer: int, qkv: Tensor, qk_norm: Tensor | None, plan: AttentionPlan, cache: KVCache) -> Tensor:
        c = self._config
        if plan is not self._plan:
            self._plan = plan
            self._masks = {w: plan.mask(c.heads // c.kv_heads, qkv.dtype, w) for w in self._windows}
            self._angles = self._rope.at(plan.positions, plan.positions_end)
        parts = qkv.view(len(qkv), -1, c.head_dim)
        qk = parts[:, : c.heads + c.kv_heads]
        if qk_norm is not None:
            qk = F.rms_norm(qk, (c.head_dim,), None, c.rms_norm_eps) * qk_norm[self._norm_rows].to(qk.dtype)
        qk = rotate(qk, *self._angles)
        self._remember(layer, plan, cache, qk, parts[:, c.heads + c.kv_heads :])
        mask = self._masks[c.window(layer)]
        return self._attend(qk[:, : c.heads], plan, mask, *cache.read(layer, plan))

    def _remember(self, layer: int, plan: AttentionPlan, cache: KVCache, qk: Tensor, values: Tensor) -> None:
        """Keeps what later tokens need of queries and keys [N, heads + kv_heads, D] and values [N, kv_heads, D]."""
        cache.write(layer, plan, qk[:, self._config.heads :], values)

    def _attend(self, queries: Tensor, plan: AttentionPlan, mask: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[N, heads * D]. A KV head's query heads become further queries of it, so no key is repeated in memory."""
        c, flat = self._config, queries.flatten(1)
        rows, width, group = plan.rows, plan.width, c.heads // c.kv_heads
        if plan.pad_index is not None:
            flat = flat.new_zeros(rows * width, flat.shape[1]).index_copy_(0, plan.pad_index, flat)
        folded = flat.view(rows, width, c.kv_heads, group, c.head_dim).transpose(1, 2).flatten(2, 3)
        attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
        flat = attended.unflatten(2, (width, group)).transpose(1, 2).reshape(rows * width, -1)
        return flat if plan.pad_index is None else flat[plan.pad_index]


class QueryProbe(TorchAttention):
    """For tokens that are in the cache: attends like them, writes nothing, and keeps their queries."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, dtype, device)
        self.queries: list[Tensor] = []
        """[N, heads, D] of each layer that ran since the list was emptied, rotated"""

    def _remember(self, layer: int, plan: AttentionPlan, cache: KVCache, qk: Tensor, values: Tensor) -> None:
        self.queries.append(qk[:, : self._config.heads])


class CPUAttention:
    """Compiled kernels (`pipeline.models.cpu_kernels`), for one token a sequence, for drafts of any lengths and for
    prompts: nothing is padded, no key is copied."""

    @staticmethod
    def takes(config: ModelConfig) -> bool:
        """Whether the heads have a multiple of so many dimensions, as those of all common models."""
        from pipeline.models.cpu_tiles import LANES

        return config.head_dim % LANES == 0

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        from pipeline.models import cpu_kernels

        self._kernels, self._config = cpu_kernels, config
        self._rope = RopeTable(config.rope, config.head_dim, torch.float32, device)
        self._epsilon = config.rms_norm_eps
        self._scale = config.head_dim**-0.5
        self._no_norm = np.zeros((0, config.head_dim), np.float32)
        self._plan: AttentionPlan | None = None
        self._shared = False
        """whether attending as `_plan` says is worth several threads"""

    @property
    def rope(self) -> RopeTable:
        return self._rope

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty_like(x)
        self._kernels.rms_norm(_array(x), weight.numpy(), self._epsilon, _array(out))
        return out

    def __call__(self, layer: int, qkv: Tensor, qk_norm: Tensor | None, plan: AttentionPlan, cache: KVCache) -> Tensor:
        c = self._config
        if plan is not self._plan:
            new = np.diff(plan.starts)
            pairs = int((new * (plan.cached + new)).sum()) * c.heads
            self._plan, self._shared = plan, torch.get_num_threads() > 1 and pairs > _WORTH_SHARING
        parts = _array(qkv).reshape(len(qkv), -1, c.head_dim)
        keys, values = _array(cache.keys(layer)), _array(cache.values(layer))
        cos, sin = self._rope.halves(plan.positions_end)
        queries = np.empty((len(parts), c.heads, c.head_dim), parts.dtype)
        norm = self._no_norm if qk_norm is None else qk_norm.numpy()
        self._kernels.prepare_attention(
            parts, norm, self._epsilon, cos, sin, plan.position, plan.place, plan.page, queries, keys, values
        )
        out = qkv.new_empty(len(qkv), c.heads * c.head_dim)
        arguments = (
            queries, keys, values, plan.tables, plan.cached, plan.starts, c.window(layer), self._scale,
            _array(out).reshape(queries.shape),
        )  # fmt: skip
        if self._shared:
            self._kernels.attend_in_parallel(*arguments)
        else:
            self._kernels.attend(*arguments, np.zeros(1, np.int64).ctypes.data)
        return out


def _array(x: Tensor) -> np.ndarray:
    """The tensor's memory as numpy; bfloat16 as int16."""
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
