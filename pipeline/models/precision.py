"""How a CPU decodes a model: in which type, since processors without bfloat16 units emulate them slowly, and up to how
many rows in one compiled call. Both are measured."""

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
_GRID = (1, 4, 12, 24, 32, 48, 64, 96)
"""rows tried"""


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


@cache
def most_compiled_rows(config: ModelConfig, threads: int) -> int:
    """Rows up to which a CPU is faster through all layers of a bfloat16 model in one compiled call than with oneDNN's
    products; measured, since processors with units for whole matrices make much of many rows.

    Args:
        config: of the model.
        threads: torch's.
    """
    part = _part(config)
    decoder, most = _zeros(part, torch.bfloat16), 0
    cache = KVCache(part, torch.bfloat16, torch.device("cpu"), _GRID[-1])
    for rows in _GRID:
        best = [float("inf"), float("inf")]
        for _ in range(_ROUNDS - 2):
            for compiled in (0, 1):
                decoder.most_compiled_rows = rows * compiled
                best[compiled] = min(best[compiled], _seconds(decoder, cache, rows))
        if best[1] > best[0]:
            break
        most = rows
    return most


def _decoding(config: ModelConfig, dtype: torch.dtype) -> Callable[[], float]:
    """A function that decodes, and returns the seconds of a step."""
    decoder, cache = _zeros(config, dtype), KVCache(config, dtype, torch.device("cpu"), max(_SEQUENCES))
    return lambda: sum(_seconds(decoder, cache, rows) for rows in _SEQUENCES)


def _zeros(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    decoder = Decoder(config, dtype, torch.device("cpu"))
    shapes = decoder.shapes
    decoder.load(lambda name: torch.zeros(shapes[name]))
    return decoder


def _seconds(decoder: Decoder, cache: KVCache, rows: int) -> float:
    """Of a decoding step of so many sequences."""
    tables, cached, new = np.arange(rows)[:, None], np.full(rows, PAGE - 1), np.ones(rows, np.int64)

    def step() -> None:
        plan = cache.plan(tables, cached, new)
        decoder.logits(decoder.forward(torch.zeros(rows, dtype=torch.int64), plan, cache))

    step()  # the first of a shape is slower
    begin = time.perf_counter()
    for _ in range(_STEPS):
        step()
    return (time.perf_counter() - begin) / _STEPS
