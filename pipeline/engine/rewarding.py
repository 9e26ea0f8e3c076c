"""Rewards of finished groups, in a thread of their own so that generation goes on meanwhile."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.engine.generator import FinishedSample
from pipeline.messages import Lease
from pipeline.tasks.rewards import RewardFunction, Scored, score_group


@dataclass(frozen=True, slots=True)
class FinishedGroup:
    """A lease whose samples are all generated."""

    lease: Lease
    samples: list[FinishedSample]
    """in the order of their index in the group"""


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    group: FinishedGroup
    scores: list[Scored]


class RewardWorker:
    """Scores groups in the order they come; `scored()` collects what is done."""

    def __init__(self, reward: RewardFunction, decode: Callable[[list[int]], str]) -> None:
        self._reward, self._decode = reward, decode
        self._waiting: queue.Queue[FinishedGroup | None] = queue.Queue()
        self._done: queue.Queue[ScoredGroup] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="reward", daemon=True)
        self._thread.start()

    def submit(self, group: FinishedGroup) -> None:
        self._waiting.put(group)

    def scored(self) -> list[ScoredGroup]:
        groups = []
        while True:
            try:
                groups.append(self._done.get_nowait())
            except queue.Empty:
                return groups

    def close(self) -> None:
        """Score what was submitted, then end."""
        self._waiting.put(None)
        self._thread.join(timeout=30)

    def _work(self) -> None:
        while (group := self._waiting.get()) is not None:
            completions = [self._decode(sample.token_ids.tolist()) for sample in group.samples]
            prompts = [group.lease.prompt] * len(completions)
            columns = {key: [value] * len(completions) for key, value in group.lease.columns.items()}
            self._done.put(ScoredGroup(group, score_group(self._reward, prompts, completions, columns)))
