"""`samples.jsonl`: a few samples of every batch as text, with who drafted what. Torch-free."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.messages import Sampler, Trajectory
from pipeline.telemetry.metrics import cut_back

ORIGINS = ("sampled", "accepted", "bonus", "residual", "unknown")
"""names of `TrajectoryHeader.origins`; the last is of samples that came without"""
LONGEST_TEXT = 4000
"""tokens of a response that are written"""


class SampleLog:
    """Appends; a resumed run's file is cut back to its checkpoint first."""

    def __init__(self, path: Path, resume_step: int) -> None:
        cut_back(path, resume_step)
        self._file = path.open("a")

    def write(self, sample: dict[str, Any]) -> None:
        self._file.write(json.dumps(sample) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def describe_batch(
    step: int, trajectories: Iterable[tuple[str, Trajectory]], count: int, decode: Callable[[list[int]], str]
) -> list[dict[str, Any]]:
    """Of a batch's (prompt, trajectory), the first `count` whose engine recorded how tokens came; where none did, as
    vLLM does not, the first `count`."""
    known = list(trajectories)
    told = [(p, t) for p, t in known if t.header.origins] or known
    return [{"step": step, **describe(p, t, decode)} for p, t in told[:count]]


def describe(prompt: str, trajectory: Trajectory, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """A sample as a line of samples.jsonl. `pieces` are stretches of tokens that came in the same way: [text, origin,
    drafter or null, sampler, tokens]."""
    header = trajectory.header
    return {
        "lease": header.lease,
        "sample": header.sample,
        "version": int(trajectory.versions.max(initial=0)),
        "prompt": prompt,
        "reward": header.reward,
        "reward_parts": header.reward_parts,
        "finish_reason": header.finish_reason,
        "tokens": header.response_tokens,
        "verifications": header.verifications,
        "pieces": list(_pieces(trajectory, decode)),
    }


def _pieces(trajectory: Trajectory, decode: Callable[[list[int]], str]) -> Iterator[list[Any]]:
    header = trajectory.header
    count = min(header.response_tokens, LONGEST_TEXT)
    names = [None, *header.drafters]
    if header.origins:
        origins = np.frombuffer(header.origins, np.uint8)[:count].astype(np.int64)
        sources = np.frombuffer(header.draft_sources, np.uint8)[:count].astype(np.int64)
    else:
        origins, sources = np.full(count, ORIGINS.index("unknown")), np.zeros(count, np.int64)
    samplers = trajectory.samplers[:count].astype(np.int64)
    kinds = (origins << 16) | (sources << 8) | samplers
    borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), count]
    for begin, end in itertools.pairwise(borders):
        if begin == end:
            continue
        text = decode(trajectory.token_ids[begin:end].tolist())
        sampler = Sampler(int(samplers[begin])).name.lower()
        yield [text, ORIGINS[origins[begin]], names[sources[begin]], sampler, end - begin]
