"""The accounts behind the ledger: leases that are not consumed, those that are, and the counters between them.

Not for several threads; the ledger guards it.
"""

from collections import Counter
from collections.abc import Callable, Iterable

import learner.journal as journal
from learner.lease_state import Account, ConsumedLeases, LeaseEntry, LedgerState, Outcome, Status
from pipeline.codec import decode_from_engine
from pipeline.messages import Lease, Trajectory

Source = Callable[[int, int], Lease]
"""(lease id, version) -> what the lease contains; the version is the one it is to be started under."""


class LeaseTable:
    """Every sample of a lease below `next_lease` is in exactly one place: trained, dropped for a reason, or in an entry
    as arrived, failed or missing."""

    def __init__(self, group_size: int, dynamic_sampling: bool) -> None:
        self.group_size = group_size
        self.entries: dict[int, LeaseEntry] = {}
        """leases granted and not consumed"""
        self.completed: list[int] = []
        """ids of COMPLETE leases, in the order they became so"""
        self._dynamic_sampling = dynamic_sampling
        self._orphaned: set[int] = set()
        """leases that became orphaned; not all of them are still"""
        self._rewards: list[float] = []
        self._filtered = 0
        self._load(LedgerState())

    def add(self, entry: LeaseEntry) -> None:
        """The lease `next_lease` is granted."""
        self.entries[self.next_lease] = entry
        self.next_lease += 1

    def orphan(self, entry: LeaseEntry) -> None:
        """Nobody works on an open lease any more."""
        entry.status = Status.ORPHANED
        self._orphaned.add(entry.lease.id)

    def first_orphan(self) -> int | None:
        """The lowest-numbered lease that nobody works on."""
        stale = {lease for lease in self._orphaned if not self._is_orphan(lease)}
        self._orphaned -= stale
        return min(self._orphaned, default=None)

    def _is_orphan(self, lease: int) -> bool:
        entry = self.entries.get(lease)
        return entry is not None and entry.status is Status.ORPHANED

    def settled(self, lease: int, sample: int) -> bool:
        """The sample arrived or failed before, or its lease is consumed."""
        entry = self.entries.get(lease)
        return lease in self.consumed or (entry is not None and entry.has(sample))

    def arrive(self, trajectory: Trajectory) -> Outcome:
        lease, sample = trajectory.id
        if (outcome := self._outcome(lease, sample)) is Outcome.ACCEPTED:
            entry = self.entries[lease]
            entry.trajectories[sample] = trajectory
            self._complete_if_whole(entry)
        return outcome

    def fail(self, lease: int, sample: int, reason: str) -> Outcome:
        if (outcome := self._outcome(lease, sample)) is Outcome.ACCEPTED:
            entry = self.entries[lease]
            entry.failed[sample] = reason
            self._complete_if_whole(entry)
        return outcome

    def consume(self, entry: LeaseEntry, reason: str) -> None:
        """The lease is done with: its samples are trained, or dropped when there is a reason."""
        lease = entry.lease.id
        del self.entries[lease]
        self.consumed.add(lease)
        if entry.status is Status.COMPLETE:
            self.completed.remove(lease)
        self._dropped += Counter(entry.failed.values())
        if reason:
            self._dropped[reason] += len(entry.trajectories)
        else:
            self.trained_samples += len(entry.trajectories)

    def completed_rewards(self) -> tuple[list[float], int]:
        """Rewards of the groups completed since the last call, and how many of them were left out."""
        rewards, filtered = self._rewards, self._filtered
        self._rewards, self._filtered = [], 0
        return rewards, filtered

    def dropped(self) -> dict[str, int]:
        failed = Counter(reason for entry in self.entries.values() for reason in entry.failed.values())
        return dict(self._dropped + self._unwanted + failed)

    def buffered(self) -> int:
        return sum(len(entry.trajectories) for entry in self.entries.values())

    def in_flight(self) -> int:
        return sum(len(entry.missing) for entry in self.entries.values())

    def account(self) -> Account:
        """Where every leased sample is."""
        failed = Counter(reason for entry in self.entries.values() for reason in entry.failed.values())
        return Account(
            leased=self.next_lease * self.group_size, trained=self.trained_samples,
            dropped=dict(self._dropped + failed), buffered=self.buffered(), in_flight=self.in_flight(),
        )  # fmt: skip

    def check(self) -> None:
        """Raises AssertionError when a counter or a state contradicts another."""
        account = self.account()
        if account.unaccounted:  # not an assert: it holds in every run, also under python -O
            raise AssertionError(f"{account.unaccounted} samples are not accounted for: {account!r}")
        assert len(self.consumed) + len(self.entries) == self.next_lease
        assert not any(lease in self.consumed for lease in self.entries)
        for entry in self.entries.values():
            assert not entry.trajectories.keys() & entry.failed.keys()
            assert bool(entry.missing) == (entry.status in (Status.OPEN, Status.ORPHANED))
        orphans = {lease for lease, entry in self.entries.items() if entry.status is Status.ORPHANED}
        assert orphans <= self._orphaned
        complete = {lease for lease, entry in self.entries.items() if entry.status is Status.COMPLETE}
        assert complete == set(self.completed) and len(complete) == len(self.completed)

    def state(self, position: int) -> LedgerState:
        return LedgerState(
            step=self.step,
            trained_samples=self.trained_samples,
            next_lease=self.next_lease,
            consumed_below=self.consumed.below,
            consumed_above=sorted(self.consumed.above),
            dropped=dict(self._dropped),
            unwanted=dict(self._unwanted),
            reissued=self.reissued,
            journal_offset=min((entry.floor for entry in self.entries.values()), default=position),
        )

    def restore(
        self, state: LedgerState, records: Iterable[tuple[int, journal.Record]], source: Source, floor: int
    ) -> None:
        """As `Ledger.restore`; deadlines are the caller's."""
        self._load(state)
        for offset, record in records:
            self._replay(offset, record, source)
        for lease in range(self.consumed.below, self.next_lease):
            if lease not in self.consumed and lease not in self.entries:
                self.entries[lease] = LeaseEntry(source(lease, 0), "", 0.0, floor)

    def _load(self, state: LedgerState) -> None:
        self.step = state.step
        self.trained_samples = state.trained_samples
        self.next_lease = state.next_lease
        self.consumed = ConsumedLeases(state.consumed_below, state.consumed_above)
        self.reissued = state.reissued
        self._dropped = Counter(state.dropped)
        self._unwanted = Counter(state.unwanted)

    def _replay(self, offset: int, record: journal.Record, source: Source) -> None:
        if record.lease in self.consumed:
            return
        if (entry := self.entries.get(record.lease)) is None:
            entry = self.entries[record.lease] = LeaseEntry(source(record.lease, 0), "", 0.0, offset)
            self.next_lease = max(self.next_lease, record.lease + 1)
        match record:
            case journal.Granted(lease, _, version, producer):
                entry.lease, entry.holder = source(lease, version), producer
            case journal.Arrived(_, sample, frames) if not entry.has(sample):
                trajectory = decode_from_engine(frames)
                assert isinstance(trajectory, Trajectory)
                entry.trajectories[sample] = trajectory
                self._complete_if_whole(entry)
            case journal.Failed(_, sample, reason) if not entry.has(sample):
                entry.failed[sample] = reason
                self._complete_if_whole(entry)
            case journal.Dropped(_, reason) if entry.status is Status.COMPLETE:
                self.consume(entry, reason)

    def _outcome(self, lease: int, sample: int) -> Outcome:
        if self.settled(lease, sample):
            self._unwanted["duplicate"] += 1
            return Outcome.DUPLICATE
        if lease not in self.entries:
            self._unwanted["unknown_lease"] += 1
            return Outcome.UNKNOWN_LEASE
        return Outcome.ACCEPTED

    def _complete_if_whole(self, entry: LeaseEntry) -> None:
        if entry.missing:
            return
        rewards = [trajectory.header.reward for trajectory in entry.group().trajectories]
        self._rewards += rewards
        if not rewards:
            self.consume(entry, "")
        elif self._dynamic_sampling and min(rewards) == max(rewards):
            self._filtered += 1
            self.consume(entry, "no_signal")
        else:
            entry.status = Status.COMPLETE
            self.completed.append(entry.lease.id)
