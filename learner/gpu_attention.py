"""Attention of all segments of a packed row in one call, by torch's FlashAttention kernel for sequences of different
length (`torch.nn.attention.varlen`; Dao 2023, "FlashAttention-2", arXiv 2307.08691).

The kernel multiplies in float16 or bfloat16 only, so `learner.dtype = "float32"` stays with one call a segment. Its
backward pass adds up in no fixed order: a step on a GPU does not repeat bit for bit.
"""

from functools import cache

import torch

AMPERE = (8, 0)
"""oldest compute capability that the kernel is made for"""
LARGEST_HEAD = 256


def varlen_runs(query_BHLD: torch.Tensor) -> bool:
    """Whether the kernel takes a row of such queries."""
    rows, _, _, dimension = query_BHLD.shape
    if query_BHLD.device.type != "cuda" or rows != 1 or dimension > LARGEST_HEAD or dimension % 8:
        return False
    return _compute(query_BHLD) in (torch.float16, torch.bfloat16) and _capable(query_BHLD.device.index)


def varlen_attention(
    query_BHLD: torch.Tensor,
    key_BGLD: torch.Tensor,
    value_BGLD: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    longest: int,
    window: int | None,
    scaling: float | None,
) -> torch.Tensor:
    """Causal attention within each segment of a row, B = 1; [B, L, H, D].

    Args:
        cu_seq_lens: int32 [segments + 1], on the queries' device.
        longest: segment, in tokens.
        window: positions that a query sees, itself included; None: all before it.
    """
    from torch.nn.attention.varlen import varlen_attn

    dtype = _compute(query_BHLD)
    query, key, value = (t[0].transpose(0, 1).to(dtype).contiguous() for t in (query_BHLD, key_BGLD, value_BGLD))
    output_LHD = varlen_attn(
        query, key, value, cu_seq_lens, cu_seq_lens, longest, longest, scale=scaling,
        window_size=(-1 if window is None else window - 1, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(output_LHD, torch.Tensor)
    return output_LHD[None]


def _compute(query: torch.Tensor) -> torch.dtype:
    """Type of the products; autocast does not know the kernel."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


@cache
def _capable(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index) >= AMPERE
