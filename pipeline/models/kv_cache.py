"""Keys and values of live sequences in pages: a sequence holds just the pages its tokens need, and shares its prompt's.

The cache keeps no lengths: a sequence knows how many of its tokens are cached, so rolling back rejected drafts is
forgetting about them; later tokens overwrite theirs. Pages after vLLM's PagedAttention (Kwon et al., arXiv 2309.06180).
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pipeline.models.config import ModelConfig

PAGE = 32
"""Tokens a page."""


class AttentionPlan:
    """Where the N new tokens of B sequences go and what they may attend to; built once a forward pass.

    Tokens are packed: row b brings `counts[b]` of them, no padding. Where a token's keys go in the cache (its place)
    and where it stands in the text (its position) differ once tokens before it were evicted.
    """

    def __init__(
        self,
        tables: np.ndarray,
        cached: np.ndarray,
        counts: np.ndarray,
        device: torch.device,
        evicted: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            tables: int64 [B, at least the most pages of a row], pages of each row in order.
            cached: int64 [B], tokens of each row that are in the cache.
            counts: int64 [B], new ones.
            device: of the tensors.
            evicted: int64 [B], tokens of each row that were in the cache and are not any more; None: no row has any.
        """
        self.tables, self.cached, self.counts, self._device = tables, cached, counts, device
        self.rows = len(cached)
        """B"""
        from pipeline.models.positions import laid_out  # numba: not for whoever imports this module for its types

        of_rows = laid_out(tables, cached, counts, evicted, PAGE)
        self.width, self.keys, self.positions_end = of_rows[:3]
        """The most new tokens of a row; longest row after this pass; past the last position."""
        self.starts = of_rows[3]
        """int64 [B + 1], where each row's tokens begin"""
        self.row, self.column = of_rows[4:6]
        """int64 [N] each, a token's row, and its place among that row's new ones"""
        self.place, self.position = of_rows[6:8]
        """int64 [N] each, among the cached tokens of its row, and in the text"""
        self.page = of_rows[8]
        """int64 [N]"""

    @cached_property
    def positions(self) -> Tensor:
        return self._tensor(self.position)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Page and place in it of each token, int64 [N] each."""
        return self._tensor(self.page), self._tensor(self.place % PAGE)

    @cached_property
    def pages(self) -> Tensor:
        """int64 [B, pages of the longest row]; rows with fewer repeat some page, which the mask hides."""
        return self._tensor(self.tables[:, : -(-self.keys // PAGE)])

    @cached_property
    def pad_index(self) -> Tensor | None:
        """int64 [N], into B x width; None where every row brings `width` tokens."""
        if len(self.row) == self.rows * self.width:
            return None
        return self._tensor(self.row * self.width + self.column)

    def mask(self, group: int, dtype: torch.dtype, window: int) -> Tensor:
        """[B, 1, width * group, pages * PAGE], added to the scores of `group` query heads a KV head.

        A query sees itself and the `window - 1` keys before it.
        """
        newest = self._tensor(self.cached)[:, None] + torch.arange(self.width, device=self._device)
        keys = torch.arange(self.pages.shape[1] * PAGE, device=self._device)
        query = newest.repeat_interleave(group, dim=1)[:, None, :, None]
        seen = (keys <= query) & (keys > query - window)
        return torch.zeros(seen.shape, dtype=dtype, device=self._device).masked_fill_(~seen, float("-inf"))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Memory of a page: keys and values of PAGE tokens in all layers."""
    return config.layers * 2 * config.kv_heads * PAGE * config.head_dim * torch.empty(0, dtype=dtype).element_size()


class KVCache:
    """Pages of keys and values, each held by one sequence or, read only, by several."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, pages: int) -> None:
        """
        Args:
            config: of the model.
            dtype: of keys and values.
            device: where they are.
            pages: most there can be. On a CPU memory is taken as they are first written to.
        """
        self._shape = (config.layers, 2, config.kv_heads, PAGE, config.head_dim)
        self._dtype, self._device = dtype, device
        self._page_bytes = page_bytes(config, dtype)
        self._empty(pages)

    def _empty(self, pages: int) -> None:
        self.store = self._zeros(pages)
        self._holders = np.zeros(pages, np.int64)
        self._free = list(range(pages - 1, -1, -1))
        self._touched = 0

    def clear(self) -> None:
        """All pages are free, and their memory is given back."""
        del self.store  # before there is another of its size
        self._empty(self.pages)

    def holders(self, pages: Sequence[int]) -> np.ndarray:
        """int64, of each page."""
        return self._holders[list(pages)]

    def _zeros(self, pages: int) -> Tensor:
        """Zeros, not garbage: a masked key still meets its value as 0 * value, and 0 * NaN is NaN."""
        shape = (*self._shape[:2], pages, *self._shape[2:])
        if self._device.type == "cpu":
            # numpy asks the system for zeros, which are no memory until written to; torch would write them itself
            kind = np.int16 if self._dtype == torch.bfloat16 else np.float32
            return torch.from_numpy(np.zeros(shape, kind)).view(self._dtype)
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    @property
    def pages(self) -> int:
        """Pages there are."""
        return len(self._holders)

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def bytes(self) -> int:
        """Of all pages that were ever used."""
        return self._touched * self._page_bytes

    def extend(self, pages: int) -> None:
        """Room for `pages` more; what is there stays where it is."""
        had = len(self._holders)
        more = self._zeros(pages)
        self.store = torch.cat([self.store, more], 2)
        self._holders = np.concatenate([self._holders, np.zeros(pages, np.int64)])
        self._free = list(range(had + pages - 1, had - 1, -1)) + self._free

    def take(self, count: int) -> list[int]:
        """`count` free pages; there must be as many."""
        pages = [self._free.pop() for _ in range(count)]
        self._holders[pages] = 1
        self._touched = max(self._touched, len(self._holders) - len(self._free))
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One holder more; shared pages are not written to."""
        self._holders[list(pages)] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less; without any a page is free."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def copy(self, source: int, target: int) -> None:
        """Contents of page `source` into page `target`."""
        self.store[:, :, target] = self.store[:, :, source]

    def plan(
        self, tables: np.ndarray, cached: np.ndarray, counts: np.ndarray, evicted: np.ndarray | None = None
    ) -> AttentionPlan:
        """For `counts` [B] new tokens after `cached` [B] ones in the pages `tables` [B, ...] lists, and `evicted` [B]
        ones that no page holds any more."""
        return AttentionPlan(tables, cached, counts, self._device, evicted)

    def write(self, layer: int, plan: AttentionPlan, keys: Tensor, values: Tensor) -> None:
        """New keys and values [N, kv_heads, head_dim] of a layer."""
        page, place = plan.places
        self.keys(layer).permute(0, 3, 1, 2)[page, place] = keys
        self.values(layer).transpose(1, 2)[page, place] = values

    def read(self, layer: int, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        """Copies [B, kv_heads, pages * PAGE, head_dim] of a layer's keys and values."""
        return self.read_pages(layer, plan.pages)

    def read_pages(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Copies [B, kv_heads, P * PAGE, head_dim] of a layer's keys and values in pages int64 [B, P]."""
        keys = self.keys(layer)[pages].permute(0, 2, 1, 4, 3).flatten(2, 3)
        return keys, self.values(layer)[pages].transpose(1, 2).flatten(2, 3)

    def write_pages(self, layer: int, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keys and values [B, kv_heads, T, head_dim] of a layer into the first T places of pages int64 [B, P]."""
        places = torch.arange(keys.shape[2], device=self._device)
        page, place = pages[:, places // PAGE], (places % PAGE).expand(len(pages), -1)
        self.keys(layer).permute(0, 3, 1, 2)[page, place] = keys.transpose(1, 2)
        self.values(layer).transpose(1, 2)[page, place] = values.transpose(1, 2)

    def keys(self, layer: int) -> Tensor:
        """[pages, kv_heads, head_dim, PAGE] of a layer: a dimension of a page's keys lies together, so that a query
        meets all of them at once."""
        return self.store[layer, 0].view(-1, self._shape[2], self._shape[4], PAGE)

    def values(self, layer: int) -> Tensor:
        """[pages, kv_heads, PAGE, head_dim] of a layer."""
        return self.store[layer, 1]
