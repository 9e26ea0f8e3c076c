"""Measures what verifications cost on this machine and model, before the first sequence."""

import time
from collections.abc import Callable

import numpy as np
import torch

from pipeline.models.decoder import Decoder
from pipeline.models.kv_cache import PAGE, KVCache
from pipeline.sampling.target import plain_target
from pipeline.sampling.verification import TokenUniforms, verify

CONTEXT = 128
"""tokens cached of each sequence"""
SIZES = tuple((rows, per_row) for rows in (1, 16, 64, 4) for per_row in (1, 2, 4, 8, 16))
"""sequences, and tokens of each; in this order, while there is time"""


@torch.no_grad()
def measure_verifications(target: Decoder, seconds: float) -> dict[tuple[int, int], float]:
    """Seconds of a verification by (sequences, tokens in all), for as many sizes as fit into `seconds`."""
    measured: dict[tuple[int, int], float] = {}
    deadline = time.perf_counter() + seconds
    context = min(CONTEXT, max(0, target.config.max_positions - 32))
    steps: dict[tuple[int, int], Callable[[], None]] = {}
    try:
        for rows, per_row in SIZES:
            if time.perf_counter() > deadline - seconds / 3:
                break
            steps[rows, rows * per_row] = step = verification_step(target, rows, per_row, context)
            step()  # the first of a size compiles, packs and allocates
        # In turns, so that a moment in which the machine is busy does not fall on one size alone; the least counts.
        while steps and time.perf_counter() < deadline:
            for size, step in steps.items():
                began = time.perf_counter()
                step()
                measured[size] = min(time.perf_counter() - began, measured.get(size, np.inf))
                if began > deadline:
                    break
    except (MemoryError, torch.OutOfMemoryError):
        pass  # what has been measured is worth having; an engine that gets here runs fewer sequences
    return measured


def verification_step(target: Decoder, rows: int, per_row: int, context: int) -> Callable[[], None]:
    """A function that verifies drafts of zeros for `rows` sequences of `context` tokens."""
    device, vocab_size = target.device, target.config.vocab_size
    pages = -(-(context + per_row) // PAGE)
    cache = KVCache(target.config, target.dtype, device, rows * pages)
    tables = np.array(cache.take(rows * pages), np.int64).reshape(rows, pages)
    cached, counts = np.full(rows, context, np.int64), np.full(rows, per_row, np.int64)
    tokens = torch.arange(rows * per_row, device=device) % vocab_size
    drafts, lengths = np.zeros((rows, per_row - 1), np.int64), counts - 1
    temperatures = torch.ones(rows * per_row, device=device)

    def step() -> None:
        hidden = target.forward(tokens, cache.plan(tables, cached, counts), cache)
        draws = TokenUniforms.draw(np.arange(rows), cached, lengths, False, device)
        verify(plain_target(target.logits(hidden), temperatures), drafts, lengths, draws).tokens.cpu()

    return step
