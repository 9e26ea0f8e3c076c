"""Computing the keys and values of text that is known: prompts, and what preempted sequences had."""

import numpy as np
import torch

from pipeline.engine.native.compression import page_table
from pipeline.engine.native.memory import Memory
from pipeline.engine.native.sequence import Sequence
from pipeline.models.decoder import Decoder

_CHUNK = 512
_PASS = 4096
"""A forward pass takes at most so many tokens with padding, and so many of one sequence: both bound its memory."""


def prefill(decoder: Decoder, memory: Memory, starting: list[Sequence], tokens: int, keep_hidden: bool) -> int:
    """Brings sequences nearer to being ready, in their order, by about `tokens` tokens altogether.

    The last token of each is left to its first verification. The prompt of a group is computed for its first sample;
    the others wait for it. A sequence for which there are no pages waits too. Returns how many tokens were computed;
    with `keep_hidden` their hidden states are kept.
    """
    budget = tokens
    for sequence in starting:
        memory.adopt_prompt(sequence)
    while tokens > 0:
        memory.compress(starting)
        chunks = _next_chunks(memory, starting, tokens)
        if not chunks:
            break
        _forward(decoder, memory, chunks, keep_hidden)
        tokens -= sum(count for _, count in chunks)
        memory.compress(starting)
        for sequence, _ in chunks:
            if sequence.cached >= len(sequence.request.prompt_ids) - 1:
                memory.keep_prompt(sequence)
        for sequence in starting:
            memory.adopt_prompt(sequence)
    return budget - tokens


def _next_chunks(memory: Memory, starting: list[Sequence], tokens: int) -> list[tuple[Sequence, int]]:
    """Sequences and how many tokens of each make up the next forward pass."""
    chunks: list[tuple[Sequence, int]] = []
    leading: set[int] = set()
    widest = 0
    for sequence in starting:
        due = memory.due(sequence)
        if sequence.ready or due <= 0 or (sequence.group in leading and not sequence.cached):
            continue
        count = min(sequence.target - sequence.cached, due, _CHUNK, tokens)
        if count <= 0 or (len(chunks) + 1) * max(widest, count) > _PASS:
            break
        if not memory.grow(sequence, sequence.held + count):
            break
        widest = max(widest, count)
        tokens -= count
        chunks.append((sequence, count))
        if sequence.cached < len(sequence.request.prompt_ids) - 1:
            leading.add(sequence.group)
    return chunks


def _forward(decoder: Decoder, memory: Memory, chunks: list[tuple[Sequence, int]], keep_hidden: bool) -> None:
    sequences = [sequence for sequence, _ in chunks]
    counts = np.array([count for _, count in chunks], np.int64)
    held = np.array([s.held for s in sequences], np.int64)
    evicted = np.array([s.evicted for s in sequences], np.int64)
    tokens = np.concatenate([s.text(s.cached, s.cached + count) for s, count in chunks])
    plan = memory.cache.plan(page_table(sequences), held, counts, evicted)
    hidden = decoder.forward(torch.from_numpy(tokens).to(decoder.device), plan, memory.cache)
    for (sequence, count), own in zip(chunks, hidden.split(counts.tolist()), strict=True):
        sequence.cached += count
        if keep_hidden:
            sequence.hidden.append(own)
