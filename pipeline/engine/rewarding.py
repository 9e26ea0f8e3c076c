"""Rewards of finished groups, in threads of their own so that generation goes on meanwhile."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.config.types import TaskSection
from pipeline.engine.generator import FinishedSample
from pipeline.errors import UsageError
from pipeline.messages import Lease
from pipeline.tasks.reward_process import ProcessScorer
from pipeline.tasks.rewards import Scored, is_built_in, load_reward, reward_name, score_group

_CLOSE_SECONDS = 30.0


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


class Scorer(Protocol):
    """Rewards of one group after another; used by one thread."""

    def score(self, prompts: list[str], completions: list[str], columns: dict[str, list[Any]]) -> list[Scored]: ...

    def close(self) -> None: ...


class BuiltInScorer:
    """Our own rewards, which need no limits: in the thread itself."""

    def __init__(self, name: str) -> None:
        self._reward = load_reward(name)

    def score(self, prompts: list[str], completions: list[str], columns: dict[str, list[Any]]) -> list[Scored]:
        return score_group(self._reward, prompts, completions, columns)

    def close(self) -> None: ...


def build_scorers(task: TaskSection) -> list[Scorer]:
    """What scores for an engine: a user's own function in processes, ours in a thread.

    Raises:
        UsageError: the function cannot be loaded.
    """
    name = reward_name(task)
    if is_built_in(name):
        return [BuiltInScorer(name)]
    scorers = [ProcessScorer(name, task.reward_seconds, task.reward_memory_mb) for _ in range(task.reward_workers)]
    try:
        for scorer in scorers:
            scorer.start()
    except UsageError:
        for scorer in scorers:
            scorer.close()
        raise
    return list(scorers)


class RewardWorker:
    """Scores groups, each scorer in a thread of its own; `scored()` collects what is done."""

    def __init__(self, scorers: Sequence[Scorer], decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self.seconds = 0.0
        """spent scoring, summed over threads"""
        self._timing = threading.Lock()
        self._waiting: queue.Queue[FinishedGroup | None] = queue.Queue()
        self._done: queue.Queue[ScoredGroup] = queue.Queue()
        self._threads = [
            threading.Thread(target=self._work, args=(scorer,), name="reward", daemon=True) for scorer in scorers
        ]
        for thread in self._threads:
            thread.start()

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
        """Score what was submitted, for half a minute at most."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def _work(self, scorer: Scorer) -> None:
        while (group := self._waiting.get()) is not None:
            began = time.perf_counter()
            try:
                scores = self._score(scorer, group)
            except Exception as error:  # a defect of ours: the group is dropped with its reason, the engine goes on
                text = f"scoring failed: {type(error).__name__}: {error}"
                scores = [Scored(None, f"sample {index}: {text}") for index in range(len(group.samples))]
            with self._timing:
                self.seconds += time.perf_counter() - began
            self._done.put(ScoredGroup(group, scores))
        scorer.close()

    def _score(self, scorer: Scorer, group: FinishedGroup) -> list[Scored]:
        completions = [self._decode(sample.token_ids.tolist()) for sample in group.samples]
        prompts = [group.lease.prompt] * len(completions)
        columns = {key: [value] * len(completions) for key, value in group.lease.columns.items()}
        columns["completion_ids"] = [sample.token_ids.tolist() for sample in group.samples]  # as TRL gives them
        return scorer.score(prompts, completions, columns)
