"""The ledger of leases: which prompts are out, which samples arrived, what may be admitted, what was trained.

Lease ids are 0, 1, 2, ...; what a lease contains is a function of its id alone. Every sample of a granted lease ends as
exactly one of trained or dropped for a reason. No sockets, files or clocks in here: time, journal offsets and lease
contents are passed in.
"""

import threading
from collections.abc import Collection, Iterable, Sequence

from learner.journal import Record
from learner.lease_state import Account, Batch, Group, LeaseEntry, LedgerState, Outcome, Status
from learner.lease_table import LeaseTable, Source
from pipeline.messages import Lease, SampleId, Trajectory

__all__ = ["Account", "Batch", "Group", "Ledger", "LedgerState", "Outcome", "Source"]


class Ledger:
    """Its methods may be called from any thread."""

    def __init__(
        self, *, batch_size: int, group_size: int, max_staleness: int, lease_seconds: float,
        dynamic_sampling: bool = False,
    ) -> None:  # fmt: skip
        """
        Args:
            batch_size: samples an optimiser batch, a multiple of `group_size`.
            group_size: samples a lease.
            max_staleness: batches that rollouts may run ahead of the published policy.
            lease_seconds: a lease without progress for this long is reissued.
            dynamic_sampling: leave out complete groups whose rewards are all equal.
        """
        if batch_size % group_size:
            raise ValueError(f"batch_size {batch_size} is not a multiple of group_size {group_size}")
        self.group_size = group_size
        self._batch_size = batch_size
        self._max_staleness = max_staleness
        self._lease_seconds = lease_seconds
        self._lock = threading.RLock()
        self._table = LeaseTable(group_size, dynamic_sampling)
        self._versions: dict[str, int] = {}
        self._first_publication: tuple[int, int] | None = None
        self._newest_version = -1

    # ---- granting ------------------------------------------------------------------------------------------------

    def published(self, version: int) -> None:
        """A policy version can be loaded now. Every batch is followed by one publication, before or after `trained`."""
        with self._lock:
            if self._first_publication is None:
                self._first_publication = version, self._table.step
            self._newest_version = version

    def grant(self, producer: str, source: Source, now: float, floor: int) -> Lease | None:
        """The next lease for a producer: one that nobody works on any more, else a new one if it is admitted.

        Admitted, in samples: trained + buffered + running <= (max_staleness + step + 1) * batch_size. `trained` is
        step * batch_size, whatever the batches held; `step` counts the batches whose policy is published. Both start
        from the checkpoint's step. Groups left out or dropped give their place back, as they are in neither term.

        Args:
            floor: the journal's position, taken before the grant is recorded there.
        """
        with self._lock:
            if self._newest_version < 0:
                return None
            deadline = now + self._lease_seconds
            if (orphan := self._table.first_orphan()) is not None:
                entry = self._table.entries[orphan]
                entry.lease = source(orphan, self._newest_version)
                entry.holder, entry.deadline, entry.status = producer, deadline, Status.OPEN
                self._table.reissued += 1
                return entry.lease
            if self.room() < 1:
                return None
            lease = source(self._table.next_lease, self._newest_version)
            self._table.add(LeaseEntry(lease, producer, deadline, floor))
            return lease

    def room(self) -> int:
        """New leases that admission allows."""
        with self._lock:
            if self._first_publication is None:
                return 0
            first_version, first_step = self._first_publication
            # A second publication for the same batch must not open room for another one.
            published_step = min(first_step + self._newest_version - first_version, self._table.step + 1)
            ahead = self._max_staleness + published_step + 1 - self._table.step
            return (ahead * self._batch_size) // self.group_size - len(self._table.entries)

    # ---- what engines say ----------------------------------------------------------------------------------------

    def hello(
        self, producer: str, running: Collection[int], spooled: Collection[SampleId], version: int, now: float
    ) -> list[SampleId]:
        """An engine connected: its leases that it neither works on nor has in its spool are free at once.

        Returns:
            Of the spooled samples, those that need not be sent.
        """
        coming = set(spooled)
        with self._lock:
            self._versions[producer] = version
            for lease, entry in self._table.entries.items():
                if entry.status is not Status.OPEN or entry.holder != producer or lease in running:
                    continue
                if not all((lease, sample) in coming for sample in entry.missing):
                    self._table.orphan(entry)
            self._claim(producer, running, now)
            return [sample for sample in spooled if self._table.settled(*sample)]

    def progress(self, producer: str, running: Collection[int], version: int, now: float) -> list[int]:
        """An engine works on these leases: their deadlines move.

        Returns:
            Those it may stop, as nothing more is wanted of them.
        """
        with self._lock:
            self._versions[producer] = version
            self._claim(producer, running, now)
            entries = ((lease, self._table.entries.get(lease)) for lease in running)
            return [
                lease for lease, entry in entries
                if entry is None or entry.status in (Status.COMPLETE, Status.TAKEN)
            ]  # fmt: skip

    def arrive(self, trajectory: Trajectory) -> Outcome:
        """A valid trajectory; the first of each sample counts."""
        with self._lock:
            return self._table.arrive(trajectory)

    def fail(self, lease: int, sample: int, reason: str) -> Outcome:
        """A sample that will not arrive, counted as dropped for `reason`."""
        with self._lock:
            return self._table.fail(lease, sample, reason)

    def hand_back(self, producer: str, leases: Iterable[int]) -> None:
        """An engine gives up leases it holds."""
        with self._lock:
            for lease in leases:
                entry = self._table.entries.get(lease)
                if entry is not None and entry.status is Status.OPEN and entry.holder == producer:
                    self._table.orphan(entry)

    def gone(self, producer: str) -> None:
        """An engine is not connected any more; its leases run until their deadlines, as it may come back."""
        with self._lock:
            self._versions.pop(producer, None)

    def lost(self, producer: str) -> None:
        """An engine ended and will not come back: its leases are free at once."""
        with self._lock:
            self.gone(producer)
            held = [lease for lease, entry in self._table.entries.items() if entry.holder == producer]
            self.hand_back(producer, held)

    def expire(self, now: float) -> list[int]:
        """Free the leases whose deadline is past; what their holders still send is welcome if it is first.

        Returns:
            The leases freed.
        """
        freed = []
        with self._lock:
            for lease, entry in self._table.entries.items():
                if entry.status is Status.OPEN and entry.deadline < now:
                    self._table.orphan(entry)
                    freed.append(lease)
        return freed

    def lease(self, lease: int) -> Lease | None:
        """The content of a lease that is not consumed."""
        with self._lock:
            entry = self._table.entries.get(lease)
            return None if entry is None else entry.lease

    def is_settled(self, lease: int) -> bool:
        """Every sample of the lease arrived or failed, or it is consumed."""
        with self._lock:
            entry = self._table.entries.get(lease)
            return entry is None or entry.status in (Status.COMPLETE, Status.TAKEN)

    def is_another_s(self, lease: int, producer: str) -> bool:
        """Whether a lease is not with this producer, but with another, or waits for one."""
        with self._lock:
            entry = self._table.entries.get(lease)
            if entry is None or entry.status not in (Status.OPEN, Status.ORPHANED):
                return False
            return entry.status is Status.ORPHANED or entry.holder not in ("", producer)

    def waiting_leases(self) -> list[str]:
        """A line for each lease with samples that have not come."""
        with self._lock:
            return [
                f"lease {lease}: {entry.status.name.lower()}, held by {entry.holder or 'nobody'}, "
                f"samples {entry.missing} have not come"
                for lease, entry in sorted(self._table.entries.items()) if entry.missing
            ]  # fmt: skip

    def idle(self) -> bool:
        """No sample is in flight."""
        with self._lock:
            return not any(entry.status in (Status.OPEN, Status.ORPHANED) for entry in self._table.entries.values())

    def holder(self, lease: int) -> str | None:
        """The producer that works on a lease; None when nobody does."""
        with self._lock:
            entry = self._table.entries.get(lease)
            return entry.holder if entry is not None and entry.status is Status.OPEN else None

    # ---- training ------------------------------------------------------------------------------------------------

    def arrived(self) -> list[Trajectory]:
        """Samples that arrived and are not consumed."""
        with self._lock:
            return [sample for entry in self._table.entries.values() for sample in entry.trajectories.values()]

    def ready(self) -> list[Group]:
        """Complete groups that no batch has taken, in the order they became complete."""
        with self._lock:
            return [self._table.entries[lease].group() for lease in self._table.completed]

    def take(self, count: int, ordered: bool) -> Batch | None:
        """`count` complete groups; None when there are not so many.

        Args:
            ordered: only the lowest-numbered leases that are neither consumed nor taken, in their order, once all of
                them are complete; so the batch does not depend on who was faster.
        """
        with self._lock:
            if ordered:
                waiting = sorted(
                    lease for lease, entry in self._table.entries.items() if entry.status is not Status.TAKEN
                )
                chosen = waiting[:count]
            else:
                chosen = self._table.completed[:count]
            if len(chosen) < count or any(self._table.entries[lease].status is not Status.COMPLETE for lease in chosen):
                return None
            for lease in chosen:
                self._table.entries[lease].status = Status.TAKEN
                self._table.completed.remove(lease)
            return Batch([self._table.entries[lease].group() for lease in chosen], *self._table.completed_rewards())

    def trained(self, batch: Batch) -> None:
        """The optimiser has seen the batch; its groups are consumed, but for those dropped before."""
        with self._lock:
            for group in batch.groups:
                entry = self._table.entries.get(group.lease.id)
                if entry is not None and entry.status is Status.TAKEN:
                    self._table.consume(entry, "")
            self._table.step += 1

    def drop(self, groups: Sequence[Group], reason: str) -> list[int]:
        """Complete groups, taken or not, that are not to be trained.

        Returns:
            The leases dropped.
        """
        with self._lock:
            dropped = []
            for group in groups:
                entry = self._table.entries.get(group.lease.id)
                if entry is not None and entry.status in (Status.COMPLETE, Status.TAKEN):
                    self._table.consume(entry, reason)
                    dropped.append(group.lease.id)
            return dropped

    # ---- counting ------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimiser batches trained."""
        return self._table.step

    @property
    def trained_samples(self) -> int:
        return self._table.trained_samples

    @property
    def reissued(self) -> int:
        """Leases granted again because their holder went silent."""
        return self._table.reissued

    @property
    def dropped(self) -> dict[str, int]:
        """Samples not trained, by reason; with "duplicate" and "unknown_lease", arrivals beyond those of the leases."""
        with self._lock:
            return self._table.dropped()

    def buffered(self) -> int:
        """Samples that arrived and are not consumed."""
        with self._lock:
            return self._table.buffered()

    def in_flight(self) -> int:
        """Samples granted that have neither arrived nor failed."""
        with self._lock:
            return self._table.in_flight()

    def oldest_loaded_version(self) -> int | None:
        """Lowest publication that a connected engine has loaded (-1: one has none yet); None without engines."""
        with self._lock:
            return min(self._versions.values(), default=None)

    def account(self) -> Account:
        """Where every sample ever leased is."""
        with self._lock:
            return self._table.account()

    def check(self) -> None:
        """Every granted sample is accounted for.

        Raises:
            AssertionError: a counter or a state contradicts another.
        """
        with self._lock:
            self._table.check()

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def state(self, position: int) -> LedgerState:
        """For a checkpoint; a batch that is taken and not trained counts as buffered.

        Args:
            position: the journal's position, taken before the call.
        """
        with self._lock:
            return self._table.state(position)

    def restore(
        self, state: LedgerState, records: Iterable[tuple[int, Record]], source: Source, now: float, floor: int
    ) -> None:
        """Continue from a checkpoint and the journal's records, before anything else.

        Leases that are not consumed and not complete stay with the producer they were granted to until their
        deadline, so that an engine that lived through the learner's restart can claim them.

        Args:
            floor: the journal's position.

        Raises:
            BadMessage: a journaled trajectory is not of this schema.
        """
        with self._lock:
            self._table.restore(state, records, source, floor)
            for entry in self._table.entries.values():
                entry.deadline = now + self._lease_seconds

    # ---- inside --------------------------------------------------------------------------------------------------

    def _claim(self, producer: str, running: Collection[int], now: float) -> None:
        for lease in running:
            entry = self._table.entries.get(lease)
            if entry is None or entry.status in (Status.COMPLETE, Status.TAKEN):
                continue
            if entry.status is Status.ORPHANED or entry.holder in ("", producer):
                entry.status, entry.holder = Status.OPEN, producer
                entry.deadline = now + self._lease_seconds
