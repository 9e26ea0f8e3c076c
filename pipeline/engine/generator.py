"""The seam between the engine service and what generates: the native generator, vLLM, a user's own."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from pipeline.errors import RunFailed
from pipeline.messages import (
    Capabilities,
    DraftCounts,
    SamplingParams,
    WeightsGroup,
    WeightsJoin,
    WeightsManifest,
)


class GeneratorLost(RunFailed):
    """What generates has died, and with it all that was under way; another can be made from the newest weights."""


class Stopped(Exception):
    """Asked to end before a generator was ready for its first lease."""


class TokenOrigin(IntEnum):
    """How a token came to be emitted, for people who look at drafting; it does not matter to the learner."""

    SAMPLED = 0
    """drawn from the target: no draft stood there"""
    ACCEPTED = 1
    BONUS = 2
    """drawn from the target after a whole draft was accepted"""
    RESIDUAL = 3
    """drawn in place of a draft token that was rejected"""


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """A prompt and the samples wanted of it."""

    id: int
    prompt_ids: np.ndarray
    """int64 [P]"""
    sampling: SamplingParams
    seeds: tuple[int, ...]
    """one a sample; a sample's text depends on its seed, the prompt and the weights, not on its neighbours"""
    temperatures: tuple[float, ...] = ()
    """one a sample, in place of the sampling parameters'; empty: theirs for all"""
    full_cache: bool = False
    """sample with all keys and values, also where the generator compresses"""
    policy_only: bool = False
    """the policy samples every token, also where the generator switches between models"""


@dataclass(frozen=True, slots=True)
class KeptIds:
    """What truncation left to draw each of T tokens from."""

    counts: np.ndarray
    """int64 [T], 0: the whole vocabulary"""
    ids: np.ndarray
    """int64 [sum of counts], token by token"""

    def first(self, n: int) -> "KeptIds":
        """Of the first n tokens."""
        return KeptIds(self.counts[:n], self.ids[: self.counts[:n].sum()])

    @staticmethod
    def joined(parts: Sequence["KeptIds"]) -> "KeptIds":
        """Of all the parts' tokens, in order."""
        return KeptIds(np.concatenate([p.counts for p in parts]), np.concatenate([p.ids for p in parts]))


@dataclass(slots=True)
class FinishedSample:
    """One generated response of T tokens, the stop token included when there is one."""

    group: int
    sample: int
    token_ids: np.ndarray
    """int64 [T]"""
    logprobs: np.ndarray
    """float32 [T], nats, under the distribution that sampled, truncation included; at temperature 1 where that is 0"""
    entropies: np.ndarray | None
    """float32 [T], nats, at the sampling temperature; None where the generator cannot give it exactly"""
    versions: np.ndarray
    """int64 [T], publication that sampled each token"""
    samplers: np.ndarray
    """uint8 [T], `pipeline.messages.Sampler`"""
    finish_reason: str
    """"stop" or "length" """
    verifications: int
    """forward passes of the target that produced it"""
    drafters: dict[str, DraftCounts] = field(default_factory=dict)
    kv_kept_across_update: bool = False
    origins: np.ndarray | None = None
    """uint8 [T], `TokenOrigin`"""
    kept: KeptIds | None = None
    """None where nothing was truncated"""
    draft_sources: np.ndarray | None = None
    """uint8 [T], who drafted an accepted token: 1 + its place in `drafters`; 0: it was not drafted"""


class Generator(Protocol):
    """Driven by one thread. `step` does one unit of work for the whole batch and returns what finished in it."""

    capabilities: Capabilities
    version: int
    """publication loaded; -1 before the first"""

    def load_weights(self, folder: Path, version: int) -> None:
        """Take effect from the next step on; sequences under way go on under the new weights."""

    def add(self, request: GroupRequest) -> None:
        """Queue a group; it starts when there is room."""

    def cancel(self, group: int) -> None:
        """Forget a group, running or queued; unknown ids are fine."""

    def step(self) -> list[FinishedSample]: ...

    def has_work(self) -> bool: ...

    def running(self) -> int:
        """Sequences running or queued."""

    def close(self) -> None: ...


@runtime_checkable
class ReceivesWeights(Protocol):
    """A generator that takes part in broadcasts of weights; others read files."""

    version: int

    def receiving(self) -> WeightsJoin:
        """Which of its processes receive weights that are broadcast, and the order in which they like them."""

    def join_group(self, group: WeightsGroup) -> None:
        """In each of these processes; leaves an earlier group.

        Raises:
            TransferFailed: the learner, or another of the processes, is not reached.
        """

    def receive_weights(self, manifest: WeightsManifest) -> None:
        """As `Generator.load_weights`, of what is broadcast in the group now.

        Raises:
            TransferFailed: not all of it came; the weights are of no version until `load_weights` has been called, and
                nothing may be sampled before.
        """

    def leave_group(self) -> None:
        """There may be none."""
