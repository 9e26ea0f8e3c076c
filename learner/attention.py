"""Attention over packed sequences: causal inside each, nothing between them.

Registered with transformers as `PACKED_ATTENTION`. The segments of a row travel as the FlashAttention keyword
arguments of a model's forward (`cu_seq_lens_q`, ...), so no quadratic mask is ever built. Without them a row is one
sequence, and padded or cached calls behave as "sdpa" does. On a GPU that can, all segments are one call of a kernel for
sequences of different length (`learner.gpu_attention`); elsewhere each is one of its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, repeat
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from learner.cpu_attention import LONG, BlockAttention
from learner.gpu_attention import varlen_attention, varlen_runs
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


def segment_arguments(
    cu_seq_lens: torch.Tensor,
    prefixes: Sequence[tuple[int, int]] | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Keyword arguments of a model's forward that say where the segments of a packed row begin and end.

    Args:
        cu_seq_lens: int32 [n + 1], 0 and the running sum of the lengths, on the CPU: every layer reads it, and reading
            it from a GPU would wait for the GPU each time.
        prefixes: of each segment, the positions [first, last) of the row that it attends to as if they stood before it.
        device: the model's.
    """
    longest = int(cu_seq_lens.diff().max())
    return {
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens if device is None else cu_seq_lens.to(device, non_blocking=True),
        "max_length_q": longest,
        "max_length_k": longest,
        "prefixes": prefixes,
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
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int = 0,
    prefixes: Sequence[tuple[int, int]] | None = None,
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
    parts = query_BHLD, key_BGLD, value_BGLD
    if _listener is not None and getattr(module, "layer_idx", None) == _listener[0]:
        assert prefixes is None
        _listener[1].append(_entropies(query_BHLD[0], key_BGLD[0], bounds, scaling, sliding_window))
    if cu_seq_lens_k is not None and prefixes is None and not dropout and varlen_runs(query_BHLD):
        return varlen_attention(*parts, cu_seq_lens_k, max_length_q, sliding_window, scaling), None
    outputs_BSHD = []
    for (start, end), prefix in zip(pairwise(bounds), prefixes or repeat((0, 0)), strict=False):
        query_BHSD = query_BHLD[:, :, start:end]
        key_BGKD, value_BGKD = (_behind(tensor, prefix, start, end) for tensor in (key_BGLD, value_BGLD))
        output_BHSD = _attend(query_BHSD, key_BGKD, value_BGKD, sliding_window, dropout, scaling)
        outputs_BSHD.append(output_BHSD.transpose(1, 2))
    return torch.cat(outputs_BSHD, dim=1), None


def _behind(tensor_BGLD: torch.Tensor, prefix: tuple[int, int], start: int, end: int) -> torch.Tensor:
    """The positions of a prefix and of a segment, [B, G, K, D]."""
    segment = tensor_BGLD[:, :, start:end]
    first, last = prefix
    return segment if first == last else torch.cat([tensor_BGLD[:, :, first:last], segment], 2)


def _attend(
    query_BHSD: torch.Tensor,
    key_BGKD: torch.Tensor,
    value_BGKD: torch.Tensor,
    window: int | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Causal attention of the last S of a sequence's K positions, [B, H, S, D]."""
    rows, heads, queries, dimension = query_BHSD.shape
    keys = key_BGKD.shape[2]
    if rows == 1 and keys >= LONG and not dropout and query_BHSD.device.type == "cpu" and onednn_pays():
        scale = dimension**-0.5 if scaling is None else scaling
        attended: torch.Tensor = BlockAttention.apply(query_BHSD[0], key_BGKD[0], value_BGKD[0], scale, window)
        return attended[None]
    mask = _mask(queries, keys, window, query_BHSD.device)
    return scaled_dot_product_attention(
        query_BHSD,
        key_BGKD,
        value_BGKD,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=heads != key_BGKD.shape[1],
    )


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """bool [queries, keys] for the last positions of a sequence that is longer than they or than the sliding window,
    None where plain causal is the same."""
    if queries == keys and (window is None or keys <= window):
        return None
    position = torch.arange(keys, device=device)
    distance = position[keys - queries :, None] - position[None, :]
    return (distance >= 0) & (distance < (window or keys))


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
        seen = _mask(length, length, window, query_HLD.device)
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
