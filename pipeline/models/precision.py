"""Which type a CPU decodes a model in: measured, since processors without bfloat16 units emulate them slowly."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from pipeline.models.config import ModelConfig
from pipeline.models.decoder import Decoder
from pipeline.models.kv_cache import PAGE, KVCache

_SEQUENCES = (1, 16)
"""Decoded at once; the times of a step of each are added up."""
_CLEARLY = 0.8
"""float32 takes the place of bfloat16 where its step takes less than this share of the time: a machine that could go
either way must not choose differently from one start to the next."""
_ROUNDS, _STEPS = 5, 3
_PARAMETERS = 16 << 20
"""About as many weights are measured: more than caches hold, in little time."""
_VOCABULARY = 8192


@dataclass(frozen=True, slots=True)
class Choice:
    """A compute type and what it was chosen by."""

    dtype: torch.dtype
    seconds: tuple[tuple[str, float], ...] = ()
    """by type, of a decoding step of a part of the model; empty: nothing was to be chosen"""

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        if not self.seconds:
            return f"{name}, as the checkpoint"
        measured = ", ".join(f"{kind} {seconds * 1e3:.2f} ms" for kind, seconds in self.seconds)
        return f"{name} ({measured} a step of a part of the model)"


@cache
def choose(config: ModelConfig, device: torch.device) -> Choice:
    """The type that `auto` stands for.

    A bfloat16 checkpoint is decoded on a CPU in bfloat16 or in float32, which holds its weights exactly, too, whichever
    is faster. No other is rounded unasked: a float32 checkpoint stays float32, and float16 is widened to it.
    """
    if config.dtype != "bfloat16":
        return Choice(torch.float32)
    if device.type != "cpu":
        return Choice(torch.bfloat16)
    steps = {dtype: _decoding(_part(config), dtype) for dtype in (torch.bfloat16, torch.float32)}
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(_ROUNDS):  # in turns, so that what else the machine does meets both
        for dtype, step in steps.items():
            best[dtype] = min(best[dtype], step())
    single = best[torch.float32] < _CLEARLY * best[torch.bfloat16]
    seconds = tuple((str(dtype).removeprefix("torch."), value) for dtype, value in best.items())
    return Choice(torch.float32 if single else torch.bfloat16, seconds)


def _part(config: ModelConfig) -> ModelConfig:
    """Some of its layers and of its vocabulary."""
    qkv = (config.heads + 2 * config.kv_heads) * config.head_dim
    layer = config.hidden_size * (qkv + config.heads * config.head_dim + 3 * config.intermediate_size)
    layers = max(1, min(config.layers, _PARAMETERS // layer))
    return replace(
        config, layers=layers, vocab_size=min(config.vocab_size, _VOCABULARY), windows=config.windows[:layers]
    )


def _decoding(config: ModelConfig, dtype: torch.dtype) -> Callable[[], float]:
    """A function that decodes, and returns the seconds of a step."""
    device = torch.device("cpu")
    decoder = Decoder(config, dtype, device)
    shapes = decoder.shapes
    decoder.load(lambda name: torch.zeros(shapes[name]))
    cache = KVCache(config, dtype, device, max(_SEQUENCES))

    def step(rows: int) -> None:
        cached = np.full(rows, PAGE - 1)
        plan = cache.plan(np.arange(rows)[:, None], cached, np.ones(rows, np.int64))
        decoder.logits(decoder.forward(torch.zeros(rows, dtype=torch.int64), plan, cache))

    def timed() -> float:
        total = 0.0
        for rows in _SEQUENCES:
            step(rows)  # the first of a shape is slower
            begin = time.perf_counter()
            for _ in range(_STEPS):
                step(rows)
            total += (time.perf_counter() - begin) / _STEPS
        return total

    return timed
