"""Where engines meet the learner: leases go out, samples come in, and the training loop takes whole batches.

The training loop calls the hub; what engines send is handled by `learner.reception` in the socket's thread.
"""

import time
from collections.abc import Callable, Sequence

from learner.hub_stats import HubStats
from learner.journal import Dropped, Journal
from learner.leases import Batch, Group, Ledger, LedgerState, Source
from learner.reception import Reception
from learner.validation import Limits
from pipeline import messages
from pipeline.errors import RunFailed
from pipeline.messages import BadMessage, Capabilities
from pipeline.transport.base import LearnerSocket

__all__ = ["Hub", "HubStats", "Limits"]

_LINGER_SECONDS = 2.0


class Hub:
    """The transport of a learner; `start` it, then publish a version, and batches can be taken."""

    def __init__(
        self,
        socket: LearnerSocket,
        journal: Journal,
        ledger: Ledger,
        source: Source,
        *,
        run_id: str,
        digest: dict[str, str],
        needs: Capabilities,
        heartbeat_seconds: float,
        lease_seconds: float,
        limits: Limits,
        on_event: Callable[[str], None],
    ) -> None:
        """
        Args:
            socket: not started.
            source: what a lease contains, a function of its id; called under the hub's lock.
            run_id: the same for as long as the run directory lives; engines refuse to mix runs.
            digest: what engine and learner must agree on.
            needs: refuse engines that cannot give these, and samples without them.
            heartbeat_seconds: how often engines report.
            lease_seconds: an engine silent for this long is taken for gone.
            limits: of samples.
            on_event: gets a line about an engine that comes, goes or fails; from any thread.
        """
        self._socket, self._journal, self._ledger, self._source = socket, journal, ledger, source
        self._heartbeat_seconds, self._on_event = heartbeat_seconds, on_event
        self._reception = Reception(
            socket, journal, ledger, source, run_id=run_id, digest=digest, needs=needs,
            lease_seconds=lease_seconds, limits=limits, on_event=on_event,
        )  # fmt: skip
        self._changed = self._reception.changed

    @property
    def address(self) -> str:
        """Where engines connect; the bound endpoint after `start`."""
        return self._socket.address

    def restore(self, state: LedgerState | None) -> None:
        """Continue from a checkpoint, or from the journal alone when there is none; before `start`.

        Raises:
            RunFailed: the journal is of another version.
        """
        state = state or LedgerState()
        try:
            # All of it: leases that the checkpoint has consumed are skipped, and an older checkpoint finds more.
            self._ledger.restore(state, self._journal.replay(), self._source, time.monotonic(), self._journal.position)
        except BadMessage as error:
            raise RunFailed(f"the journal was written by another version ({error}); resume with that one") from error
        if self._journal.corrupt:
            self._on_event(f"the journal has {self._journal.corrupt} damaged stretches; their samples are sampled anew")

    def start(self) -> None:
        """Listen.

        Raises:
            UsageError: the address cannot be listened on.
        """
        self._socket.start(self._reception)

    def stop(self) -> None:
        """Send what is queued, close the socket."""
        self._socket.stop(_LINGER_SECONDS)

    def publish(self, version: int) -> None:
        """A policy version is on disk: engines are told, and leases go out. Once for every batch trained."""
        with self._changed:
            self._reception.version = version
            self._ledger.published(version)
            self._reception.broadcast(messages.Published(version=version))
            self._reception.grant()

    def take(self, count: int, ordered: bool, timeout: float) -> Batch | None:
        """Wait for `count` complete groups (see `Ledger.take`); None after `timeout` seconds.

        Raises:
            RunFailed: nothing more can come: the journal or the socket failed, or every engine ended by an error.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                self._reception.raise_failure()
                if (batch := self._ledger.take(count, ordered)) is not None:
                    return batch
                if (remaining := deadline - time.monotonic()) <= 0:
                    return None
                self._changed.wait(remaining)

    def ready(self) -> list[Group]:
        """Complete groups that no batch has taken."""
        return self._ledger.ready()

    def trained(self, batch: Batch) -> None:
        """The batch went into the optimiser."""
        with self._changed:
            self._ledger.trained(batch)
            self._reception.grant()

    def drop(self, groups: Sequence[Group], reason: str) -> None:
        """These groups are not to be trained; others are granted in their place."""
        with self._changed:
            for lease in self._ledger.drop(groups, reason):
                self._journal.append(Dropped(lease, reason))
            self._reception.grant()

    def state(self) -> LedgerState:
        """For a checkpoint."""
        position = self._journal.position
        return self._ledger.state(position)

    def oldest_loaded_version(self) -> int | None:
        """Lowest publication that a connected engine has loaded (-1: none yet); None without engines."""
        return self._ledger.oldest_loaded_version()

    def drain(self, timeout: float) -> bool:
        """Tell engines that the run is over and wait until they have left; False when some are there still."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._reception.draining = True
            for engine in self._reception.roster:
                engine.draining = True
            self._reception.broadcast(messages.Drain())
            while len(self._reception.roster) and (remaining := deadline - time.monotonic()) > 0:
                self._changed.wait(min(remaining, self._heartbeat_seconds))
                self._reception.remove_silent(5 * self._heartbeat_seconds)
            return not len(self._reception.roster)

    def fail(self, message: str, traceback: str = "") -> None:
        """Tell engines that the learner ends by an error."""
        with self._changed:
            self._reception.broadcast(messages.Fatal(message=message, traceback=traceback))

    def stats(self) -> HubStats:
        with self._changed:
            return HubStats(
                engines=len(self._reception.roster),
                credit=self._reception.roster.credit,
                generated_tokens=self._reception.roster.generated_tokens,
                busy_seconds=self._reception.roster.busy_seconds,
                in_flight=self._ledger.in_flight(),
                buffered=self._ledger.buffered(),
                step=self._ledger.step,
                trained_samples=self._ledger.trained_samples,
                dropped=self._ledger.dropped,
                reissued=self._ledger.reissued,
                spooled_bytes=self._reception.roster.spooled_bytes,
                journal_bytes=self._journal.size,
                bad_messages=self._reception.bad_messages,
                sends_lost=self._socket.sends_lost,
            )
