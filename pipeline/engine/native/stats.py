"""What a generator counts, and where its time goes."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.engine.native.sequence import Emission


@dataclass(slots=True)
class GeneratorStats:
    """Counts and wall seconds since the generator was made."""

    generated_tokens: int = 0
    verifications: int = 0
    """forward passes, counted once for each sequence in them"""
    drafted: int = 0
    accepted: int = 0
    drafter_failures: int = 0
    preemptions: int = 0
    """sequences that lost their memory to others and were computed again"""
    compressions: int = 0
    """of sequences' caches, those of preempted ones again"""
    forward_seconds: float = 0.0
    drafter_seconds: float = 0.0
    sampling_seconds: float = 0.0
    other_seconds: float = 0.0

    def count(self, emissions: Iterable[Emission]) -> None:
        for emission in emissions:
            self.verifications += 1
            self.generated_tokens += len(emission.token_ids)
            self.drafted += emission.drafted
            self.accepted += emission.accepted


class Laps:
    """Books the time of a step to its parts; on a GPU waiting shows up where results are first read."""

    def __init__(self, stats: GeneratorStats) -> None:
        self._stats, self.mark = stats, 0.0
        """when the last lap ended, in `time.perf_counter` seconds"""

    def start(self) -> None:
        self.mark = time.perf_counter()

    def forward(self) -> None:
        self._stats.forward_seconds += self._lap()

    def drafter(self) -> None:
        self._stats.drafter_seconds += self._lap()

    def sampling(self) -> None:
        self._stats.sampling_seconds += self._lap()

    def other(self) -> None:
        self._stats.other_seconds += self._lap()

    def _lap(self) -> float:
        now = time.perf_counter()
        passed, self.mark = now - self.mark, now
        return passed
