"""Evaluation on held-out prompts: leases of their own, pinned to one policy version, never trained on nor journaled.

The learner publishes nothing while an evaluation is under way, so every token of it comes from the version that it asks
for. Its leases have ids that no training lease has, and seeds that are the same in every evaluation of a run: two
versions are compared on the same random numbers.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from statistics import fmean

from msgspec import structs

from pipeline.config import Config
from pipeline.errors import UsageError
from pipeline.messages import Lease, SampleId, SamplingParams, Trajectory
from pipeline.tasks.base import Example, Task
from pipeline.tasks.prompts import sample_seed

EVAL_LEASES = 1 << 60
"""Evaluation leases have ids from here on."""
_LEASES_A_VERSION = 1 << 24


class Evaluation:
    """One evaluation: what is to be sampled, who works on it, what came. Not for several threads, the hub guards it."""

    def __init__(self, leases: Sequence[Lease]) -> None:
        self._leases = {lease.id: lease for lease in leases}
        self._free = deque(self._leases)
        self._held: dict[int, tuple[str, float]] = {}
        self._samples: dict[SampleId, Trajectory | None] = {}
        """None: the sample failed"""
        self.began = time.monotonic()

    @property
    def group_size(self) -> int:
        return next((lease.group_size for lease in self._leases.values()), 0)

    @property
    def missing(self) -> int:
        return sum(lease.group_size for lease in self._leases.values()) - len(self._samples)

    def lease(self, lease: int) -> Lease | None:
        return self._leases.get(lease)

    def grant(self, producer: str, deadline: float) -> Lease | None:
        """The next lease that nobody works on."""
        if not self._free:
            return None
        lease = self._free.popleft()
        self._held[lease] = producer, deadline
        return self._leases[lease]

    def renew(self, producer: str, running: Collection[int], deadline: float) -> None:
        """A producer works on these."""
        for lease in running:
            if lease in self._held:
                self._held[lease] = producer, deadline

    def lost(self, producer: str) -> None:
        """A producer is gone: others get its leases."""
        self._free_again([lease for lease, (holder, _) in self._held.items() if holder == producer])

    def expire(self, now: float) -> list[int]:
        """Free the leases whose deadline is past; returns them."""
        past = [lease for lease, (_, deadline) in self._held.items() if deadline < now]
        self._free_again(past)
        return past

    def arrive(self, sample: SampleId, trajectory: Trajectory | None) -> None:
        """A sample of one of the leases, or None where it failed; the first counts."""
        self._samples.setdefault(sample, trajectory)
        lease = self._leases[sample[0]]
        if all((lease.id, index) in self._samples for index in range(lease.group_size)):
            self._held.pop(lease.id, None)
            if lease.id in self._free:
                self._free.remove(lease.id)

    def metrics(self, success: float) -> dict[str, float]:
        """`eval_*` of metrics.jsonl. A failed sample has reward 0, as users would see it.

        Args:
            success: reward from which a sample counts as solved.
        """
        came = [trajectory for trajectory in self._samples.values() if trajectory is not None]
        rewards = {
            lease.id: [_reward(self._samples.get((lease.id, index))) for index in range(lease.group_size)]
            for lease in self._leases.values()
        }
        every = [reward for group in rewards.values() for reward in group]
        solved = [sum(reward >= success for reward in group) for group in rewards.values()]
        entropies = [float(t.entropies.mean()) for t in came if t.entropies is not None and len(t.entropies)]
        found = {
            "eval_reward_mean": fmean(every),
            "eval_response_length_mean": fmean([len(t.token_ids) for t in came]) if came else math.nan,
            "eval_truncated_fraction": fmean([t.header.finish_reason == "length" for t in came]) if came else math.nan,
            "eval_entropy": fmean(entropies) if entropies else math.nan,
            "eval_samples": float(len(every)),
            "eval_failed": float(len(self._samples) - len(came)),
            "eval_seconds": time.monotonic() - self.began,
        }
        for k in _powers_of_two(self.group_size):
            found[f"eval_pass_at_{k}"] = fmean([pass_at_k(self.group_size, count, k) for count in solved])
        return found

    def _free_again(self, leases: Sequence[int]) -> None:
        for lease in leases:
            del self._held[lease]
            self._free.append(lease)


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Unbiased estimate, from some samples of a prompt, that one of k solves it: 1 - C(n - c, k) / C(n, k) (Chen et al.
    2021, "Evaluating large language models trained on code", arXiv 2107.03374, equation 1)."""
    return 1.0 - math.comb(samples - solved, k) / math.comb(samples, k)


def evaluation_source(
    task: Task, encode: Callable[[str], list[int]], sampling: SamplingParams, config: Config
) -> Callable[[int], list[Lease]]:
    """What gives the leases of an evaluation of a publication: the first `learner.eval_prompts` held-out prompts that
    have at most `sampling.max_prompt_tokens` tokens.

    Raises:
        UsageError: there is no such prompt.
    """
    learner = config.learner
    chosen: list[tuple[Example, list[int]]] = []
    for example in task.held_out:
        if len(chosen) == learner.eval_prompts:
            break
        if 0 < len(ids := encode(example.prompt)) <= config.sampling.max_prompt_tokens:
            chosen.append((example, ids))
    if not chosen:
        raise UsageError(
            "there is no held-out prompt to evaluate on; set task.held_out_path to a file of them, or "
            "learner.eval_every = 0"
        )
    sampling = structs.replace(sampling, temperature=learner.eval_temperature)

    def leases(version: int) -> list[Lease]:
        first = EVAL_LEASES + version * _LEASES_A_VERSION
        return [
            Lease(
                id=first + index,
                epoch=0,
                kind="eval",
                prompt=example.prompt,
                prompt_ids=tuple(ids),
                columns=example.columns,
                group_size=learner.eval_samples,
                sampling=sampling,
                seeds=tuple(
                    sample_seed(config.run.seed, 0, EVAL_LEASES + index, s) for s in range(learner.eval_samples)
                ),
                version=version,
            )
            for index, (example, ids) in enumerate(chosen)
        ]

    return leases


def _reward(trajectory: Trajectory | None) -> float:
    return trajectory.header.reward if trajectory is not None else 0.0


def _powers_of_two(limit: int) -> list[int]:
    return [1 << power for power in range(limit.bit_length()) if 1 << power <= limit]
