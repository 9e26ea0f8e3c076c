"""Measures what verifications cost on this machine and model, before the first sequence."""

import time
from collections.abc import Callable

import numpy as np
import torch

from pipeline.models.decoder import Decoder
from pipeline.models.kv_cache import PAGE, KVCache
from pipeline.sampling.plain import verify_plain
from pipeline.sampling.target import plain_target
from pipeline.sampling.verification import TokenUniforms, verify

CONTEXT = 128
"""tokens cached of each sequence"""
SIZES = tuple((rows, per_row) for rows in (1, 4, 16, 64) for per_row in (1, 2, 4, 8) if rows * per_row <= 512)
"""sequences, and tokens of each"""
_TURNS, _IN_A_ROW = 2, 3
"""how often each size is come back to, so that a moment in which the machine is busy does not fall on one size alone,
and how often it is then measured: the first step after one of another size finds its weights out of the caches"""


@torch.no_grad()
def measure_verifications(target: Decoder, seconds: float, most_rows: int) -> dict[tuple[int, int], float]:
    """Seconds of a verification by (sequences, tokens in all), for as many sizes of up to about `most_rows` sequences
    as fit into `seconds`."""
    measured: dict[tuple[int, int], float] = {}
    deadline = time.perf_counter() + seconds
    context = min(CONTEXT, max(0, target.config.max_positions - 32))
    largest = min((rows for rows, _ in SIZES if rows >= most_rows), default=SIZES[-1][0])
    try:
        for _ in range(_TURNS):
            for rows, per_row in (size for size in SIZES if size[0] <= largest):
                if time.perf_counter() > deadline and measured:
                    return measured
                step = verification_step(target, rows, per_row, context)
                step()  # the first of a size compiles, packs and allocates
                for _ in range(_IN_A_ROW):
                    began = time.perf_counter()
                    step()
                    taken = time.perf_counter() - began
                    size = rows, rows * per_row
                    measured[size] = min(taken, measured.get(size, np.inf))
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
    ids, warm = np.arange(rows), torch.ones(rows * per_row, device=device)

    def step() -> None:
        logits = target.logits(target.forward(tokens, cache.plan(tables, cached, counts), cache))
        if device.type == "cpu":
            verify_plain(logits, np.ones(rows), drafts, lengths, ids, cached)
        else:
            draws = TokenUniforms.draw(ids, cached, lengths, False, device)
            verify(plain_target(logits, warm), drafts, lengths, draws).tokens.cpu()

    return step
