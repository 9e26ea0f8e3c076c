"""What the ledger hands out and what it stores: groups, batches, the set of consumed leases, its checkpoint."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

import msgspec

from pipeline.messages import Lease, Trajectory


class Outcome(Enum):
    """What became of a sample that arrived."""

    ACCEPTED = auto()
    DUPLICATE = auto()
    UNKNOWN_LEASE = auto()


class Status(Enum):
    """Where a lease stands between its grant and its end."""

    OPEN = auto()
    """granted; samples are missing"""
    ORPHANED = auto()
    """samples are missing and nobody works on it"""
    COMPLETE = auto()
    """every sample arrived or failed"""
    TAKEN = auto()
    """in a batch that is being trained"""


@dataclass(slots=True)
class LeaseEntry:
    """A lease that is not consumed. `trajectories` and `failed` have no sample in common."""

    lease: Lease
    holder: str
    """producer that works on it; empty when none is known"""
    deadline: float
    floor: int
    """no record of this lease lies before this offset of the journal"""
    status: Status = Status.OPEN
    trajectories: dict[int, Trajectory] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    def has(self, sample: int) -> bool:
        return sample in self.trajectories or sample in self.failed

    @property
    def missing(self) -> list[int]:
        return [sample for sample in range(self.lease.group_size) if not self.has(sample)]

    def group(self) -> "Group":
        return Group(self.lease, [self.trajectories[sample] for sample in sorted(self.trajectories)], dict(self.failed))


@dataclass(slots=True)
class Group:
    """A complete lease: its valid samples, in the order of their index, and those that failed, with the reason."""

    lease: Lease
    trajectories: list[Trajectory]
    failed: dict[int, str] = field(default_factory=dict)

    def age(self, version: int) -> int:
        """Publications that its oldest token is behind `version`; 0 without a token."""
        return max((version - int(t.versions.min()) for t in self.trajectories if len(t.versions)), default=0)


@dataclass(slots=True)
class Batch:
    """Groups to train on."""

    groups: list[Group]
    unfiltered_rewards: list[float]
    """of every group that became complete since the last batch was taken, also those left out"""
    filtered_groups: int
    """groups left out since then because their rewards are all equal"""


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """Where every sample ever leased is. `leased` equals the sum of the others at any moment."""

    leased: int
    trained: int
    dropped: dict[str, int]
    """by reason; arrivals beyond the first of a sample are not in here"""
    buffered: int
    """arrived, and neither trained nor dropped"""
    in_flight: int
    """neither arrived nor failed"""

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        return (
            f"of {self.leased} samples leased {self.trained} are trained, {sum(self.dropped.values())} dropped"
            f"{f' ({reasons})' if reasons else ''}, {self.buffered} wait for a batch, {self.in_flight} have not come"
        )

    @property
    def unaccounted(self) -> int:
        """0, or a defect."""
        return self.leased - self.trained - sum(self.dropped.values()) - self.buffered - self.in_flight


class ConsumedLeases:
    """A set of lease ids that is dense from 0: everything below `below`, and the ids in `above`."""

    def __init__(self, below: int = 0, above: Iterable[int] = ()) -> None:
        self.below = below
        self.above = set(above)

    def __contains__(self, lease: int) -> bool:
        return lease < self.below or lease in self.above

    def __len__(self) -> int:
        return self.below + len(self.above)

    def add(self, lease: int) -> None:
        self.above.add(lease)
        while self.below in self.above:
            self.above.remove(self.below)
            self.below += 1


class LedgerState(msgspec.Struct, kw_only=True):
    """The ledger's part of a checkpoint; the samples themselves are in the journal."""

    step: int = 0
    trained_samples: int = 0
    next_lease: int = 0
    consumed_below: int = 0
    consumed_above: list[int] = msgspec.field(default_factory=list)
    dropped: dict[str, int] = msgspec.field(default_factory=dict)
    """samples of consumed leases that were not trained, by reason"""
    unwanted: dict[str, int] = msgspec.field(default_factory=dict)
    """arrivals beyond the first of each sample, by reason"""
    reissued: int = 0
    journal_offset: int = 0
    """lowest offset of a record needed to restore the leases that are not consumed"""
