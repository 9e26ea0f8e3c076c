"""Attention over packed sequences: causal inside each, nothing between them.

Registered with transformers as `PACKED_ATTENTION`. The segments of a row travel as the FlashAttention keyword
arguments of a model's forward (`cu_seq_lens_q`, ...), so no quadratic mask is ever built. Without them a row is one
sequence, and padded or cached calls behave as "sdpa" does.
"""

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_ATTENTION = "packed_sdpa"


def segment_arguments(cu_seq_lens: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments of a model's forward that say where the sequences of a packed row begin and end.

    Args:
        cu_seq_lens: int32 [n + 1], 0 and the running sum of the lengths, on the CPU: every layer reads it, and reading
            it from a GPU would wait for the GPU each time.
    """
    longest = int(cu_seq_lens.diff().max())
    return {
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def packed_sdpa(
    module: torch.nn.Module,
    query_BHLD: torch.Tensor,
    key_BGLD: torch.Tensor,
    value_BGLD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of H heads over G key-value heads; returns [B, L, H, D] as transformers expects it."""
    length = query_BHLD.shape[2]
    if attention_mask is not None or key_BGLD.shape[2] != length:
        return sdpa_attention_forward(
            module, query_BHLD, key_BGLD, value_BGLD, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("softcap") is not None:
        raise ValueError("packed attention has no soft cap")
    bounds = [0, length] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    outputs_BSHD = []
    for start, end in pairwise(bounds):
        segment = slice(start, end)
        window = _window_mask(end - start, sliding_window, query_BHLD.device)
        output_BHSD = scaled_dot_product_attention(
            query_BHLD[:, :, segment],
            key_BGLD[:, :, segment],
            value_BGLD[:, :, segment],
            attn_mask=window,
            is_causal=window is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query_BHLD.shape[1] != key_BGLD.shape[1],
        )
        outputs_BSHD.append(output_BHSD.transpose(1, 2))
    return torch.cat(outputs_BSHD, dim=1), None


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """bool [length, length] for a sequence longer than the sliding window, None where plain causal is the same."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """No mask where rows are whole sequences; the mask of "sdpa" for padding or a cache."""
    if attention_mask is None and q_length == kv_length:
        return None
    mask: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        **kwargs,
    )
    return mask


AttentionInterface.register(PACKED_ATTENTION, packed_sdpa)
AttentionMaskInterface.register(PACKED_ATTENTION, packed_mask)
