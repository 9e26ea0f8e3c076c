"""Starting sequences: their prompts' keys and values, computed once a group."""

import numpy as np
import torch

from pipeline.engine.native.sequence import Sequence
from pipeline.models.decoder import Decoder
from pipeline.models.kv_cache import KVCache

_CHUNK = 512
_TOKENS = 4096
"""A forward pass of prompts takes at most this many tokens, and this wide a chunk of each: both bound its memory."""


def start_sequences(
    decoder: Decoder, cache: KVCache, live: list[Sequence], starting: list[Sequence], weight_loads: int
) -> None:
    """Appends `starting` to `live`, each with all but the last token of its prompt in the cache.

    The last token is left to the first verification, which samples from it. A later member of a group copies the
    prompt from a live one, unless weights have been loaded since that one's was computed.
    """
    slots = {s.request.id: slot for slot, s in enumerate(live) if s.prompt_weights == weight_loads}
    leaders: list[Sequence] = []
    followers: list[Sequence] = []
    for sequence in starting:
        sequence.prompt_weights = weight_loads
        if sequence.request.id in slots:
            followers.append(sequence)
        else:
            slots[sequence.request.id] = len(live) + len(leaders)
            leaders.append(sequence)
    first = len(live)
    live += leaders + followers
    cache.reserve(len(live), max(s.cached for s in starting))
    _prefill(decoder, cache, first, [s.request.prompt_ids[:-1] for s in leaders])
    for slot, sequence in enumerate(followers, first + len(leaders)):
        cache.copy(slots[sequence.request.id], slot, sequence.cached)


def _prefill(decoder: Decoder, cache: KVCache, first: int, prompts: list[np.ndarray]) -> None:
    """Prompt b goes into slot `first + b`."""
    longest = max((len(p) for p in prompts), default=0)
    if longest == 0:
        return
    rows = max(1, _TOKENS // min(longest, _CHUNK))
    for start in range(0, len(prompts), rows):
        batch = prompts[start : start + rows]
        lengths = np.array([len(p) for p in batch], np.int64)
        for offset in range(0, int(lengths.max()), _CHUNK):
            tokens = np.concatenate([p[offset : offset + _CHUNK] for p in batch]).astype(np.int64)
            plan = cache.plan(first + start, np.minimum(lengths, offset), np.clip(lengths - offset, 0, _CHUNK))
            decoder.forward(torch.from_numpy(tokens).to(decoder.device), plan, cache)
