"""Keys and values of live sequences: one slot a sequence, the live ones always in the first slots.

Attention then reads views instead of gathering. The cache keeps no lengths: a sequence knows how many of its tokens
are cached, so rolling back rejected drafts is forgetting about them; later tokens overwrite theirs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.models.config import ModelConfig

_LENGTH_STEP = 64


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where the N new tokens of B consecutive slots go and what they may attend to; built once a forward pass.

    Tokens are packed: row b brings `counts[b]` of them, no padding. Attention alone pads them to the widest row, T.
    """

    first: int
    rows: int
    width: int
    """T"""
    keys: int
    """L, longest row after this pass"""
    positions: Tensor
    """int64 [N]"""
    write_index: Tensor
    """int64 [N], into slots x capacity"""
    pad_index: Tensor | None
    """int64 [N], into B x T; None where every row brings T tokens"""
    mask: Tensor | None
    """[B, 1, T * query heads a KV head, L], added to scores; None where every query sees every key"""


class KVCache:
    """Per layer, keys and values [slots, capacity, kv_heads, head_dim]; both leading sizes grow with need."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, max_slots: int, max_length: int
    ) -> None:
        self._config, self._dtype, self._device = config, dtype, device
        self._max_slots, self._max_length = max_slots, max_length
        self._store = self._allocate(0, 0)

    def _allocate(self, slots: int, capacity: int) -> Tensor:
        c = self._config
        # Zeros, not garbage: a masked key still meets its value as 0 * value, and 0 * NaN is NaN.
        return torch.zeros(c.layers, 2, slots, capacity, c.kv_heads, c.head_dim, dtype=self._dtype, device=self._device)

    @property
    def bytes(self) -> int:
        return self._store.numel() * self._store.element_size()

    def reserve(self, slots: int, length: int) -> None:
        """Room for `slots` sequences of `length` tokens, what is cached kept."""
        have_slots, have_length = self._store.shape[2:4]
        if slots <= have_slots and length <= have_length:
            return
        if slots > have_slots:
            slots = min(self._max_slots, max(slots, 2 * have_slots))
        if length > have_length:
            length = min(self._max_length, -(-max(length, have_length * 5 // 4) // _LENGTH_STEP) * _LENGTH_STEP)
        grown = self._allocate(max(slots, have_slots), max(length, have_length))
        grown[:, :, :have_slots, :have_length] = self._store
        self._store = grown

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` tokens of slot `source` into slot `target`."""
        self._store[:, :, target, :length] = self._store[:, :, source, :length]

    def plan(self, first: int, cached: np.ndarray, counts: np.ndarray) -> AttentionPlan:
        """For `counts` [B] new tokens after `cached` [B] ones in the slots from `first` on."""
        rows, width, keys = len(cached), int(counts.max()), int((cached + counts).max())
        self.reserve(first + rows, keys)
        row = np.repeat(np.arange(rows), counts)
        column = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        positions = cached[row] + column
        ragged = len(row) != rows * width
        return AttentionPlan(
            first=first,
            rows=rows,
            width=width,
            keys=keys,
            positions=self._tensor(positions),
            write_index=self._tensor((first + row) * self._store.shape[3] + positions),
            pad_index=self._tensor(row * width + column) if ragged else None,
            mask=self._mask(cached, width, keys),
        )

    def _mask(self, cached: np.ndarray, width: int, keys: int) -> Tensor | None:
        if width == 1 and (cached + 1 == keys).all():
            return None
        group = self._config.heads // self._config.kv_heads
        queries = self._tensor(cached)[:, None] + torch.arange(width, device=self._device)
        seen = torch.arange(keys, device=self._device) <= queries.repeat_interleave(group, dim=1)[:, None, :, None]
        return torch.zeros(seen.shape, dtype=self._dtype, device=self._device).masked_fill_(~seen, float("-inf"))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def write(self, layer: int, plan: AttentionPlan, keys: Tensor, values: Tensor) -> None:
        """New keys and values [N, kv_heads, head_dim] of a layer."""
        for which, new in enumerate((keys, values)):
            self._store[layer, which].flatten(0, 1).index_copy_(0, plan.write_index, new)

    def read(self, layer: int, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        """Views [B, kv_heads, L, head_dim] of a layer's keys and values."""
        window = self._store[layer, :, plan.first : plan.first + plan.rows, : plan.keys].transpose(2, 3)
        return window[0], window[1]
