"""What drafting is worth: the same generation timed with and without it, in turns, in one process."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from drafters.registry import build
from pipeline.engine.generator import GroupRequest
from pipeline.engine.native.generator import GeneratorStats, NativeGenerator
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from pipeline.models.checkpoint import load_decoder
from pipeline.models.decoder import Decoder

_EARLIER = 2**32
"""between the seeds that are timed and those before them"""


@dataclass(frozen=True, slots=True)
class _Timing:
    tokens_per_second: float
    stats: GeneratorStats


def drafting_speedup(
    model: str | Path | Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    group_size: int,
    drafter: dict[str, Any],
    *,
    repeats: int = 5,
    max_sequences: int = 64,
    max_draft_tokens: int = 8,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Times `group_size` samples of each prompt, `repeats` times with drafter `none` and with the given one.

    An untimed plain run fixes each sample's length; the timed runs generate exactly so many tokens, so that rounding
    which sends one run down another path cannot make it shorter. Before each, outside the clock, the same prompts are
    sampled with other seeds, with the same drafter: an engine has generated before, has measured what verifying costs,
    and remembers the last epoch. Drafting itself is inside the clock.

    Returns:
        `ratio` {median, min, max} of tokens a second, drafted over plain, pair by pair; `tokens_per_second`
        {plain, drafted} medians; `acceptance_rate` (None where nothing was drafted) and
        `tokens_per_verification` of the drafted runs; `tokens` a run;
        `repeats`; `drafter`; `drafter_failures`.

    Raises:
        UsageError: nothing to generate, or what `NativeGenerator` and `drafters.registry.build` refuse.
    """
    if not prompts or group_size < 1 or repeats < 1:
        raise UsageError("measuring drafting needs a prompt, a group size and a number of repeats of at least 1")
    decoder = model if isinstance(model, Decoder) else load_decoder(model, dtype, device)
    requests = [
        GroupRequest(i, np.array(ids, np.int64), sampling, tuple(seed + i * group_size + s for s in range(group_size)))
        for i, ids in enumerate(prompts)
    ]

    def generator(piece: dict[str, Any], stop: Sequence[int] | None) -> NativeGenerator:
        return NativeGenerator(
            decoder,
            drafter=build(piece),
            max_sequences=max_sequences,
            max_draft_tokens=max_draft_tokens,
            stagger=True,
            stop_token_ids=stop,
            entropy=True,
        )

    lengths = _natural_lengths(generator({"name": "none"}, None), requests)
    unstopped = msgspec.structs.replace(sampling, stop_token_ids=(), stop_strings=(), min_new_tokens=0)
    requests = [GroupRequest(r.id, r.prompt_ids, unstopped, r.seeds) for r in requests]
    earlier = [GroupRequest(r.id, r.prompt_ids, sampling, tuple(s + _EARLIER for s in r.seeds)) for r in requests]
    plain: list[_Timing] = []
    drafted: list[_Timing] = []
    for repeat in range(repeats):
        turns = [(plain, {"name": "none"}), (drafted, drafter)]
        for timings, piece in turns if repeat % 2 == 0 else reversed(turns):
            timings.append(_timed(generator(piece, ()), earlier, requests, lengths))
    return _summary(plain, drafted, str(drafter["name"]))


def _natural_lengths(generator: NativeGenerator, requests: list[GroupRequest]) -> dict[int, list[int]]:
    """Tokens of each sample of each group, stop tokens obeyed."""
    lengths = {r.id: [0] * len(r.seeds) for r in requests}
    for request in requests:
        generator.add(request)
    while generator.has_work():
        for sample in generator.step():
            lengths[sample.group][sample.sample] = len(sample.token_ids)
    return lengths


def _timed(
    generator: NativeGenerator,
    earlier: list[GroupRequest],
    requests: list[GroupRequest],
    lengths: dict[int, list[int]],
) -> _Timing:
    for request in earlier:
        generator.add(request, lengths[request.id])
    while generator.has_work():
        generator.step()
    before, start = generator.stats(), time.perf_counter()
    for request in requests:
        generator.add(request, lengths[request.id])
    while generator.has_work():
        generator.step()
    seconds, after = time.perf_counter() - start, generator.stats()
    generator.close()
    stats = GeneratorStats(**{f.name: getattr(after, f.name) - getattr(before, f.name) for f in fields(after)})
    return _Timing(stats.generated_tokens / seconds, stats)


def _summary(plain: list[_Timing], drafted: list[_Timing], drafter: str) -> dict[str, Any]:
    ratios = [d.tokens_per_second / p.tokens_per_second for p, d in zip(plain, drafted, strict=True)]
    stats = [timing.stats for timing in drafted]
    total_drafted, tokens = sum(s.drafted for s in stats), sum(s.generated_tokens for s in stats)
    return {
        "drafter": drafter,
        "repeats": len(ratios),
        "tokens": plain[0].stats.generated_tokens,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "tokens_per_second": {
            "plain": statistics.median(t.tokens_per_second for t in plain),
            "drafted": statistics.median(t.tokens_per_second for t in drafted),
        },
        "acceptance_rate": sum(s.accepted for s in stats) / total_drafted if total_drafted else None,
        "tokens_per_verification": tokens / sum(s.verifications for s in stats),
        "drafter_failures": sum(s.drafter_failures for s in stats),
    }
