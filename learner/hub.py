"""Where engines meet the learner: leases go out, samples come in, and the training loop takes whole batches.

The training loop calls the hub; what engines send is handled by `learner.reception` in the socket's thread.
"""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from learner.evaluation import Evaluation
from learner.hub_stats import HubStats
from learner.journal import Dropped, Journal
from learner.leases import Batch, Group, Ledger, LedgerState, Source
from learner.reception import Reception
from learner.roster import short_name
from learner.validation import Limits
from pipeline import codec, messages
from pipeline.errors import RunFailed
from pipeline.messages import BadMessage, Capabilities, Lease
from pipeline.transport.base import LearnerSocket
from pipeline.weights.stream import WeightsServer

if TYPE_CHECKING:
    from pipeline.weights.sending import WeightsBroadcaster

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
        weights: WeightsServer | None = None,
        broadcaster: "WeightsBroadcaster | None" = None,
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
            weights: answers engines that cannot read the folder of publications; None: nobody asks.
            broadcaster: sends publications to engines that join a process group; None: there are none.
        """
        self._socket, self._journal, self._ledger, self._source = socket, journal, ledger, source
        self._heartbeat_seconds, self._on_event = heartbeat_seconds, on_event
        self._reception = Reception(
            socket, journal, ledger, source, run_id=run_id, digest=digest, needs=needs,
            lease_seconds=lease_seconds, limits=limits, on_event=on_event, on_weights=self._weights_asked,
            on_gone=self._gone, broadcasts=broadcaster is not None,
        )  # fmt: skip
        self._changed = self._reception.changed
        self._weights, self._broadcaster = weights, broadcaster

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
        for sample in self._ledger.arrived():
            header = sample.header
            self._reception.sequences.restored(header.producer, header.incarnation, header.sequence)
        if self._journal.corrupt:
            self._on_event(f"the journal has {self._journal.corrupt} damaged stretches; their samples are sampled anew")

    def start(self) -> None:
        """Listen.

        Raises:
            UsageError: the address cannot be listened on.
        """
        self._socket.start(self._reception)
        if self._weights is not None:
            self._weights.start(self._send, self._socket.waiting)
        if self._broadcaster is not None:
            self._broadcaster.start(self._send)

    def stop(self) -> None:
        """Send what is queued, close the socket."""
        if self._weights is not None:
            self._weights.stop()
        if self._broadcaster is not None:
            self._broadcaster.stop()
        self._socket.stop(_LINGER_SECONDS)

    def publish(self, version: int) -> None:
        """A policy version is on disk: engines are told, and leases go out. Once for every batch trained."""
        with self._changed:
            self._reception.version = version
            self._ledger.published(version)
            self._reception.broadcast(messages.Published(version=version))
            self._reception.grant()

    def take(self, count: int, ordered: bool, timeout: float, max_age: int = 0) -> Batch | None:
        """Wait for `count` complete groups (see `Ledger.take`); None after `timeout` seconds.

        Args:
            max_age: groups with a token that is more publications behind are dropped as `stale`; 0: none.

        Raises:
            RunFailed: nothing more can come: the journal or the socket failed, or every engine ended by an error.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                self._reception.raise_failure()
                if max_age:
                    self._drop_older(max_age)
                if (batch := self._ledger.take(count, ordered)) is not None:
                    return batch
                if (remaining := deadline - time.monotonic()) <= 0:
                    return None
                self._changed.wait(remaining)

    def begin_evaluation(self, leases: Sequence[Lease]) -> None:
        """Have these sampled before anything else."""
        with self._changed:
            self._reception.evaluation = Evaluation(leases)
            self._reception.advanced_at = time.monotonic()
            self._reception.grant()

    def evaluated(self, timeout: float) -> Evaluation | None:
        """Wait for the evaluation to be complete; None after `timeout` seconds.

        Raises:
            RunFailed: as of `take`.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                self._reception.raise_failure()
                evaluation = self._reception.evaluation
                if evaluation is not None and not evaluation.missing:
                    self._reception.evaluation = None
                    return evaluation
                if (remaining := deadline - time.monotonic()) <= 0:
                    return None
                self._changed.wait(remaining)

    def grant_no_training(self) -> None:
        """From now on only evaluations are sampled."""
        with self._changed:
            self._reception.training = False

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
            self._reception.broadcast(messages.fatal(f"the learner failed: {message}", traceback))

    def check(self) -> None:
        """Every leased sample is accounted for.

        Raises:
            AssertionError: a defect: a counter contradicts another.
        """
        self._ledger.check()

    def stalled_seconds(self) -> float:
        """That connected engines have been asked for samples and none came; 0 without engines, and while nothing is
        asked for."""
        with self._changed:
            waiting = len(self._reception.roster) and self._reception.asked
            return time.monotonic() - self._reception.advanced_at if waiting else 0.0

    def describe(self) -> str:
        """Engines and leases as they are, for somebody who looks why nothing comes."""
        now = time.monotonic()
        with self._changed:
            lines = [
                f"engine {engine.producer}: incarnation {engine.incarnation}, heard {now - engine.heard:.1f} s ago, "
                f"generated something {now - engine.advanced:.1f} s ago, takes {engine.credit} samples, "
                f"{engine.spooled_bytes} bytes in its spool, leases it has not confirmed: {sorted(engine.unseen)}"
                for engine in self._reception.roster
            ]
            evaluation = self._reception.evaluation
            if evaluation is not None:
                lines.append(f"an evaluation: {evaluation.missing} samples have not come")
        return "\n".join(["engines:", *lines, "leases:", *self._ledger.waiting_leases(), str(self._ledger.account())])

    def _drop_older(self, age: int) -> None:
        if stale := [group for group in self._ledger.ready() if group.age(self._reception.version) > age]:
            self.drop(stale, "stale")

    def _weights_asked(self, peer: bytes, message: messages.WeightsQuestion) -> None:
        if isinstance(message, messages.WeightsRequest):
            if self._weights is None:
                raise BadMessage('it asks for weights, which weights.transport = "filesystem" does not send')
            self._weights.request(peer, message)
        elif self._broadcaster is None:
            raise BadMessage('it asks for a process group, which weights.transfer = "files" does not have')
        else:
            engine = self._reception.roster.get(peer)
            self._broadcaster.handle(peer, message, f"engine {short_name(engine.producer)}" if engine else "an engine")

    def _gone(self, peer: bytes) -> None:
        if self._broadcaster is not None:
            self._broadcaster.gone(peer)

    def _send(self, peer: bytes, message: messages.LearnerMessage) -> None:
        self._socket.send(peer, codec.encode(message))

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
                account=self._ledger.account(),
                received_samples=self._reception.received_samples,
                received_bytes=self._reception.received_bytes,
                unjournaled_bytes=self._reception.unjournaled_bytes,
                journal_stalled=self._journal.stalled,
                strangers=self._reception.strangers,
                damaged_messages=self._socket.damaged,
                refused_connections=dict(self._socket.refused),
                sequence_missing=self._reception.sequences.missing,
                sequence_repeats=self._reception.sequences.repeats,
                blocked_seconds=self._reception.roster.blocked_seconds,
                spool_damaged=self._reception.roster.spool_damaged,
                journal_damaged=self._journal.corrupt,
                engine_time=self._reception.roster.seconds,
            )
