"""Where engines meet the learner: leases go out, samples come in, and the training loop takes whole batches.

Messages are handled in the socket's thread and acknowledged from the journal's; the training loop calls the rest. A
sample is answered twice: Received when the ledger has it, Committed when the journal has synced it, or at once when it
is not wanted.
"""

import threading
import time
from collections.abc import Callable, Sequence

from learner.acknowledgements import Acknowledgements
from learner.hub_stats import HubStats
from learner.journal import Arrived, Dropped, Failed, Granted, Journal
from learner.leases import Batch, Group, Ledger, LedgerState, Source
from learner.roster import Engine, Roster, short_name
from learner.validation import Limits, check_sample, check_trajectory, refusal
from pipeline import messages
from pipeline.errors import RunFailed
from pipeline.messages import BadMessage, Trajectory
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
        needs_entropy: bool,
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
            needs_entropy: refuse engines that cannot give per-token entropies.
            heartbeat_seconds: how often engines report.
            lease_seconds: an engine silent for this long is taken for gone.
            limits: of samples.
            on_event: gets a line about an engine that comes, goes or fails; from any thread.
        """
        self._socket, self._journal, self._ledger, self._source = socket, journal, ledger, source
        self._run_id, self._digest, self._needs_entropy, self._limits = run_id, digest, needs_entropy, limits
        self._heartbeat_seconds, self._lease_seconds, self._on_event = heartbeat_seconds, lease_seconds, on_event
        self._changed = threading.Condition(threading.RLock())
        self._roster = Roster()
        self._version = -1
        self._draining = False
        self._bad_messages = 0
        self._error: RunFailed | None = None
        self._acknowledgements = Acknowledgements(self._changed, self._roster, journal, self._send)
        journal.on_error = self._journal_failed

    # ---- for the training loop -----------------------------------------------------------------------------------

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
        self._socket.start(self)

    def stop(self) -> None:
        """Send what is queued, close the socket."""
        self._socket.stop(_LINGER_SECONDS)

    def publish(self, version: int) -> None:
        """A policy version is on disk: engines are told, and leases go out. Once for every batch trained."""
        with self._changed:
            self._version = version
            self._ledger.published(version)
            for engine in self._roster:
                self._send(engine.peer, messages.Published(version=version))
            self._grant()

    def take(self, count: int, ordered: bool, timeout: float) -> Batch | None:
        """Wait for `count` complete groups (see `Ledger.take`); None after `timeout` seconds.

        Raises:
            RunFailed: nothing more can come: the journal or the socket failed, or every engine ended by an error.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                self._raise_failure()
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
            self._grant()

    def drop(self, groups: Sequence[Group], reason: str) -> None:
        """These groups are not to be trained; others are granted in their place."""
        with self._changed:
            for lease in self._ledger.drop(groups, reason):
                self._journal.append(Dropped(lease, reason))
            self._grant()

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
            self._draining = True
            for engine in self._roster:
                engine.draining = True
                self._send(engine.peer, messages.Drain())
            while len(self._roster) and (remaining := deadline - time.monotonic()) > 0:
                self._changed.wait(min(remaining, self._heartbeat_seconds))
                self._remove_silent(5 * self._heartbeat_seconds)
            return not len(self._roster)

    def fail(self, message: str, traceback: str = "") -> None:
        """Tell engines that the learner ends by an error."""
        with self._changed:
            for engine in self._roster:
                self._send(engine.peer, messages.Fatal(message=message, traceback=traceback))

    def stats(self) -> HubStats:
        with self._changed:
            return HubStats(
                engines=len(self._roster),
                credit=self._roster.credit,
                generated_tokens=self._roster.generated_tokens,
                busy_seconds=self._roster.busy_seconds,
                in_flight=self._ledger.in_flight(),
                buffered=self._ledger.buffered(),
                step=self._ledger.step,
                trained_samples=self._ledger.trained_samples,
                dropped=self._ledger.dropped,
                reissued=self._ledger.reissued,
                spooled_bytes=self._roster.spooled_bytes,
                journal_bytes=self._journal.size,
                bad_messages=self._bad_messages,
                sends_lost=self._socket.sends_lost,
            )

    # ---- called by the socket ------------------------------------------------------------------------------------

    def on_message(self, peer: bytes, frames: list[bytes]) -> None:
        try:
            message = messages.decode_from_engine(frames)
            with self._changed:
                if isinstance(message, messages.Hello):
                    self._hello(peer, message)
                elif (engine := self._roster.get(peer)) is not None:
                    engine.heard = time.monotonic()
                    self._handle(engine, message, frames)
                # Without HELLO a peer is a stranger, or an engine that does not know yet that the learner restarted:
                # hearing nothing it connects anew, and sends again what was not acknowledged.
        except BadMessage as error:
            self._reject(peer, error)

    def on_disconnect(self, peer: bytes) -> None:
        with self._changed:
            if (engine := self._roster.remove(peer)) is not None:
                self._gone(engine, "disconnected")

    def on_tick(self) -> None:
        with self._changed:
            self._ledger.expire(time.monotonic())
            self._remove_silent(self._lease_seconds)
            self._grant()

    def on_error(self, error: Exception) -> None:
        with self._changed:
            self._error = RunFailed(f"the learner's socket failed: {type(error).__name__}: {error}")
            self._changed.notify_all()

    # ---- what engines say ----------------------------------------------------------------------------------------

    def _hello(self, peer: bytes, hello: messages.Hello) -> None:
        refused = refusal(hello, self._digest, self._needs_entropy)
        newest = self._roster.newest_incarnation(hello.producer)
        if refused is None and hello.incarnation < newest:
            refused = messages.Refused(reason=_TAKEN_OVER.format(hello.producer, newest))
        if refused is not None:
            self._on_event(f"engine {short_name(hello.producer)} refused: {refused.reason}")
            self._send(peer, refused)
            self._socket.disconnect(peer)
            return
        now = time.monotonic()
        engine = Engine(peer, hello.producer, hello.incarnation, now, draining=self._draining)
        self._replace(self._roster.add(engine), engine)
        received = self._ledger.hello(hello.producer, hello.running, hello.spooled, hello.version, now)
        self._send(peer, messages.Welcome(
            schema=messages.SCHEMA, run=self._run_id, version=self._version, received=tuple(received)
        ))  # fmt: skip
        self._acknowledgements.repeat(engine, received)
        if self._draining:
            self._send(peer, messages.Drain())
        self._on_event(f"engine {short_name(hello.producer)} connected, {len(self._roster)} in all")

    def _handle(self, engine: Engine, message: messages.EngineMessage | Trajectory, frames: list[bytes]) -> None:
        match message:
            case Trajectory():
                self._trajectory(engine, message, frames)
            case messages.SampleFailed():
                self._sample_failed(engine, message)
            case messages.Progress():
                self._progress(engine, message)
            case messages.Leaving():
                self._roster.left(engine)
                self._ledger.hand_back(engine.producer, message.handed_back)
                self._gone(engine, "left")
            case messages.Fatal():
                self._end(engine, message.message, f"failed: {message.message}\n{message.traceback}".rstrip())

    def _trajectory(self, engine: Engine, trajectory: Trajectory, frames: list[bytes]) -> None:
        header = trajectory.header
        check_sample(header.lease, header.sample, self._ledger.group_size)
        lease = self._ledger.lease(header.lease)
        check_trajectory(trajectory, engine.producer, lease, self._limits, self._needs_entropy)
        outcome = self._ledger.arrive(trajectory)
        self._acknowledgements.give(engine, trajectory.id, outcome, Arrived(*trajectory.id, frames))
        self._sample_settled(engine, header.lease)

    def _sample_failed(self, engine: Engine, message: messages.SampleFailed) -> None:
        sample = message.lease, message.sample
        check_sample(*sample, self._ledger.group_size)
        outcome = self._ledger.fail(*sample, message.reason)
        self._acknowledgements.give(engine, sample, outcome, Failed(*sample, message.reason, message.detail))
        self._sample_settled(engine, message.lease)

    def _sample_settled(self, engine: Engine, lease: int) -> None:
        engine.unseen.pop(lease, None)
        self._grant()
        self._changed.notify_all()

    def _progress(self, engine: Engine, message: messages.Progress) -> None:
        self._roster.progress(engine, message)
        unwanted = self._ledger.progress(engine.producer, message.running, message.version, engine.heard)
        if unwanted:
            self._send(engine.peer, messages.Revoke(leases=tuple(unwanted)))
        # The answer that tells an idle engine that the learner is alive.
        self._send(engine.peer, messages.Published(version=self._version))
        self._grant()

    # ---- inside --------------------------------------------------------------------------------------------------

    def _grant(self) -> None:
        """Grant all that admission and credit allow, in one message an engine, so that they can start together."""
        if self._draining or self._error is not None:
            return
        grants: dict[bytes, list[messages.Lease]] = {}
        now = time.monotonic()
        while (engine := self._roster.freest(self._ledger.group_size)) is not None:
            lease = self._ledger.grant(engine.producer, self._source, now, self._journal.position)
            if lease is None:
                break
            self._journal.append(Granted(lease.id, lease.epoch, lease.version, engine.producer))
            engine.unseen[lease.id] = lease.group_size
            grants.setdefault(engine.peer, []).append(lease)
        for peer, leases in grants.items():
            self._send(peer, messages.Grant(leases=tuple(leases)))

    def _replace(self, before: Engine | None, engine: Engine) -> None:
        """The same producer was connected elsewhere: the connection is an old one, or its process is."""
        if before is None:
            return
        if before.incarnation < engine.incarnation:
            reason = _TAKEN_OVER.format(engine.producer, engine.incarnation)
            self._send(before.peer, messages.Refused(reason=reason))
        self._socket.disconnect(before.peer)

    def _reject(self, peer: bytes, error: BadMessage) -> None:
        """A peer that breaks the protocol is told why and not listened to any more; the others are not concerned."""
        with self._changed:
            self._bad_messages += 1
            self._send(peer, messages.Fatal(message=f"the learner refuses what this engine sent: {error}"))
            self._socket.disconnect(peer)
            engine = self._roster.get(peer)
            if engine is None:
                self._on_event(f"a peer that is no engine sent a bad message: {error}")
            else:
                self._end(engine, f"its messages were refused: {error}", f"sent a bad message: {error}")

    def _end(self, engine: Engine, error: str, how: str) -> None:
        """An engine that will not come back as it is."""
        self._roster.failed(engine, error)
        self._ledger.lost(engine.producer)
        self._gone(engine, how)

    def _gone(self, engine: Engine, how: str) -> None:
        self._ledger.gone(engine.producer)
        self._on_event(f"engine {short_name(engine.producer)} {how}, {len(self._roster)} connected")
        self._grant()
        self._changed.notify_all()

    def _remove_silent(self, seconds: float) -> None:
        for engine in self._roster.silent(time.monotonic() - seconds):
            self._roster.remove(engine.peer)
            self._gone(engine, f"silent for {seconds:.0f} s")

    def _journal_failed(self, error: OSError) -> None:
        with self._changed:
            self._error = RunFailed(
                f"the journal cannot be written ({error.strerror or error}); free space on its disk and resume the run"
            )
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._error is not None:
            raise self._error
        if failures := self._roster.all_failed():
            raise RunFailed(f"every engine failed: {'; '.join(failures)}")

    def _send(self, peer: bytes, message: messages.LearnerMessage) -> None:
        self._socket.send(peer, messages.encode(message))


_TAKEN_OVER = "another engine process works as producer {} (incarnation {}); give each engine a spool of its own"
