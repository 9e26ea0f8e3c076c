"""Attention over packed sequences: causal inside each, nothing between them.

Registered with transformers as `PACKED_ATTENTION`. The segments of a row travel as the FlashAttention keyword
arguments of a model's forward (`cu_seq_lens_q`, ...), so no quadratic mask is ever built. Without them a row is one
sequence, and padded or cached calls behave as "sdpa" does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from learner.cpu_attention import LONG, BlockAttention
from learner.linear import onednn_pays

PACKED_ATTENTION = "packed_sdpa"

_listener: tuple[int, list[torch.Tensor]] | None = None
"""(layer, where its attention entropies go) while somebody wants them"""


@contextmanager
def attention_entropies(model: PreTrainedModel, wanted: bool = True) -> Iterator[list[torch.Tensor]]:
    """Within it, every packed forward pass of `model` adds to the list the attention entropy of its middle layer at
    each of its L positions, float32 [L]: mean of the heads, over the log of the context length, 0 at a first token.

    The layer's probabilities are formed for one sequence at a time, quadratic in its length; not differentiated.
    """
    global _listener
    found: list[torch.Tensor] = []
    _listener = (model.config.num_hidden_layers // 2, found) if wanted else None
    try:
        yield found
    finally:
        _listener = None


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
        parts = query_BHLD[:, :, segment], key_BGLD[:, :, segment], value_BGLD[:, :, segment]
        output_BHSD = _attend(*parts, sliding_window, dropout, scaling)
        outputs_BSHD.append(output_BHSD.transpose(1, 2))
    if _listener is not None and getattr(module, "layer_idx", None) == _listener[0]:
        _listener[1].append(_entropies(query_BHLD[0], key_BGLD[0], bounds, scaling, sliding_window))
    return torch.cat(outputs_BSHD, dim=1), None


def _attend(
    query_BHSD: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSD: torch.Tensor,
    window: int | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Causal attention of one sequence, [B, H, S, D]."""
    rows, heads, length, dimension = query_BHSD.shape
    if rows == 1 and length >= LONG and not dropout and query_BHSD.device.type == "cpu" and onednn_pays():
        scale = dimension**-0.5 if scaling is None else scaling
        attended: torch.Tensor = BlockAttention.apply(query_BHSD[0], key_BGSD[0], value_BGSD[0], scale, window)
        return attended[None]
    mask = _window_mask(length, window, query_BHSD.device)
    return scaled_dot_product_attention(
        query_BHSD,
        key_BGSD,
        value_BGSD,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=heads != key_BGSD.shape[1],
    )


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """bool [length, length] for a sequence longer than the sliding window, None where plain causal is the same."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


@torch.no_grad()
def _entropies(
    query_HLD: torch.Tensor, key_GLD: torch.Tensor, bounds: list[int], scaling: float | None, window: int | None
) -> torch.Tensor:
    """Attention entropy over log(context length) at each position, mean of the heads; float32 [L]."""
    heads, dimension = query_HLD.shape[0], query_HLD.shape[-1]
    key_HLD = key_GLD.repeat_interleave(heads // key_GLD.shape[0], 0)
    scale = dimension**-0.5 if scaling is None else scaling
    parts = []
    for start, end in pairwise(bounds):
        scores_HSS = (query_HLD[:, start:end] @ key_HLD[:, start:end].transpose(1, 2)).float() * scale
        length = end - start
        seen = _window_mask(length, window, query_HLD.device)
        if seen is None:
            seen = torch.ones(length, length, dtype=torch.bool, device=query_HLD.device).tril()
        probabilities_HSS = scores_HSS.masked_fill(~seen, -torch.inf).softmax(-1)
        entropy_S = torch.special.entr(probabilities_HSS).sum(-1).mean(0)
        parts.append(entropy_S / seen.sum(-1).clamp(min=2).log())
    return torch.cat(parts)


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
