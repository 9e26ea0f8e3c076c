"""Causal attention of one long sequence on a CPU, forward and backward, as matrix products of blocks.

A block of queries of all heads that share keys is one product with the keys before it; what is kept for the backward
pass is linear in the length (Dao et al. 2022, "FlashAttention", arXiv 2205.14135, section 3.1).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from learner.linear import times_transposed

QUERY_BLOCK = 128
"""Queries a block. Keys after a block's last query are not multiplied, so smaller blocks waste less; larger products
are faster."""
LONG = 192
"""From this length on it is faster than torch's kernel, forward and backward together (measured in float32: 0.7 of its
time at 400 tokens, 0.55 at 1,000); below, the time of starting each product decides."""


@dataclass(frozen=True, slots=True)
class Block:
    """Queries [first, last) over keys [start, end)."""

    first: int
    last: int
    start: int
    end: int


def blocks(queries: int, keys: int, window: int | None) -> Iterator[Block]:
    """All queries, which are the last of the keys; keys that a sliding window hides from a whole block are left out."""
    before = keys - queries
    for first in range(0, queries, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, queries)
        start = 0 if window is None else max(0, before + first - window + 1)
        yield Block(first, last, start, before + last)


class BlockAttention(torch.autograd.Function):
    """Arguments: query [H, L, D], key and value [G, K, D] with H a multiple of G and the queries at the last L of the K
    positions, the scale of the scores, and the sliding window or None. Returns [H, L, D] in the queries' type; computes
    in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        query_HLD: torch.Tensor,
        key_GKD: torch.Tensor,
        value_GKD: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        groups = len(key_GKD)
        query, key, value = _by_group(query_HLD, groups), _float(key_GKD), _float(value_GKD)
        output = torch.empty_like(query)
        for block in blocks(query.shape[2], key.shape[1], window):
            rows, seen = slice(block.first, block.last), slice(block.start, block.end)
            for g in range(groups):
                p = _probabilities(query[g, :, rows], key[g, seen], block, scale, window)
                output[g, :, rows] = _rows(p, value[g, seen].t())
        ctx.save_for_backward(query_HLD, key_GKD, value_GKD, output)
        ctx.scale, ctx.window = scale, window
        return output.view(query_HLD.shape).to(query_HLD.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_HLD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_HLD, key_GKD, value_GKD, output = ctx.saved_tensors
        groups = len(key_GKD)
        query, key, value = _by_group(query_HLD, groups), _float(key_GKD), _float(value_GKD)
        gradient = _by_group(gradient_HLD, groups)
        inner = (gradient * output).sum(-1, keepdim=True)
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for block in blocks(query.shape[2], key.shape[1], ctx.window):
            rows, seen = slice(block.first, block.last), slice(block.start, block.end)
            for g in range(groups):
                q, k, v = query[g, :, rows], key[g, seen], value[g, seen]
                p = _probabilities(q, k, block, ctx.scale, ctx.window)
                out = gradient[g, :, rows]
                of_value[g, seen] += _columns(p, out)
                of_scores = _rows(out, v).sub_(inner[g, :, rows]).mul_(p).mul_(ctx.scale)
                of_query[g, :, rows] = _rows(of_scores, k.t())
                of_key[g, seen] += _columns(of_scores, q)
        return (
            of_query.view(query_HLD.shape).to(query_HLD.dtype), of_key.to(key_GKD.dtype), of_value.to(value_GKD.dtype),
            None, None,
        )  # fmt: skip


def _float(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()


def _by_group(tensor_HLD: torch.Tensor, groups: int) -> torch.Tensor:
    """[G, heads a group, L, D]"""
    return _float(tensor_HLD).view(groups, -1, *tensor_HLD.shape[1:])


def _rows(a_RBK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """a b^T for R heads at once, [R, B, N]"""
    return times_transposed(a_RBK.reshape(-1, a_RBK.shape[-1]), b_NK).view(*a_RBK.shape[:2], -1)


def _columns(a_RBK: torch.Tensor, b_RBN: torch.Tensor) -> torch.Tensor:
    """a^T b summed over R heads, [K, N]"""
    a, b = a_RBK.reshape(-1, a_RBK.shape[-1]), b_RBN.reshape(-1, b_RBN.shape[-1])
    return times_transposed(a.t(), b.t())


def _probabilities(
    q_RBD: torch.Tensor, k_KD: torch.Tensor, block: Block, scale: float, window: int | None
) -> torch.Tensor:
    """[R, B, K]; 0 where a query must not look."""
    scores_RBK = _rows(q_RBD * scale, k_KD)
    queries = block.last - block.first
    scores_RBK[..., -queries:] += _future(queries)
    if window is not None and block.end - block.start > window:
        position = torch.arange(block.start, block.end)
        scores_RBK.masked_fill_(position[-queries:, None] - position[None, :] >= window, -torch.inf)
    return scores_RBK.softmax(-1)


@cache
def _future(queries: int) -> torch.Tensor:
    """[B, B]: minus infinity above the diagonal, else 0."""
    return torch.full((queries, queries), -torch.inf).triu_(1)
