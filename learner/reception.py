"""What the learner does with what engines say: HELLO, progress, samples, farewells, and everything malformed.

Messages are handled in the socket's thread. A sample is answered when the journal has synced it, or at once when it is
not wanted.
"""

import threading
import time
from collections.abc import Callable

from learner.acknowledgements import Acknowledgements
from learner.evaluation import EVAL_LEASES, Evaluation
from learner.grants import Grants
from learner.journal import Arrived, Failed, Journal
from learner.leases import Ledger, Outcome, Source
from learner.roster import Engine, Roster, short_name
from learner.sequences import Sequences
from learner.validation import Limits, check_sample, check_trajectory, drop_reason, refusal
from pipeline import codec, messages
from pipeline.errors import RunFailed
from pipeline.failpoints import failpoint
from pipeline.messages import BadMessage, Capabilities, SampleId, Trajectory
from pipeline.telemetry.log import LineLimit
from pipeline.transport.base import LearnerSocket

_TAKEN_OVER = "another engine process works as producer {} (incarnation {}); give each engine a spool of its own"
_LINES_A_MINUTE = 20
"""about peers that are no engines; the rest is counted only"""


class Reception:
    """The handler of the learner's socket. Its state is guarded by `changed`, which is notified when a batch may have
    become possible, or impossible."""

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
        lease_seconds: float,
        limits: Limits,
        on_event: Callable[[str], None],
        on_weights: Callable[[bytes, messages.WeightsQuestion], None],
        on_gone: Callable[[bytes], None],
        broadcasts: bool,
    ) -> None:
        """Arguments as of `learner.hub.Hub`; `on_gone` hears of peers that are no engines any more."""
        self._socket, self._journal, self._ledger, self._source = socket, journal, ledger, source
        self._run_id, self._digest, self._needs, self._limits = run_id, digest, needs, limits
        self._lease_seconds, self._on_event = lease_seconds, on_event
        self.changed = threading.Condition(threading.RLock())
        self.roster = Roster()
        self.version = -1
        """newest publication"""
        self.draining = False
        """nothing more is granted"""
        self.evaluation: Evaluation | None = None
        """under way; its leases are granted before others"""
        self.training = True
        """leases for training are granted"""
        self.bad_messages = 0
        self.strangers = 0
        """messages of peers that had not said HELLO"""
        self.received_samples = self.received_bytes = 0
        """of trajectories, duplicates included"""
        self.advanced_at = time.monotonic()
        """when the last sample arrived that was wanted; or, if that is later, when samples were asked for after a time
        in which none were, or when an engine came after a time without one"""
        self.sequences = Sequences()
        self._on_weights, self._on_gone, self._broadcasts = on_weights, on_gone, broadcasts
        self._lines = LineLimit(_LINES_A_MINUTE)
        self._error: RunFailed | None = None
        self._grants = Grants(socket, journal, ledger, source, self.roster)
        self._acknowledgements = Acknowledgements(self.changed, self.roster, journal, self._send)
        journal.on_error = self._journal_failed
        journal.on_stall = self._journal_stalled

    # ---- for the hub, which holds `changed` ----------------------------------------------------------------------

    def grant(self) -> None:
        """Grant all that admission and credit allow."""
        if self.draining or self._error is not None:
            return
        idle = not self.asked
        try:
            self._grants.grant(self.evaluation, self.training, self._lease_seconds)
        except RunFailed as error:
            self._error = error
            self.changed.notify_all()
        if idle and self.asked:
            self.advanced_at = time.monotonic()

    @property
    def asked(self) -> bool:
        """Whether there are samples that engines were asked for and that have not come."""
        return not self._ledger.idle() or (self.evaluation is not None and self.evaluation.missing > 0)

    def broadcast(self, message: messages.LearnerMessage) -> None:
        """Send a message to every engine."""
        for engine in self.roster:
            self._send(engine.peer, message)

    def remove_silent(self, seconds: float) -> None:
        """Take engines that were silent for so long for gone."""
        for engine in self.roster.silent(time.monotonic() - seconds):
            self.roster.remove(engine.peer)
            self._gone(engine, f"silent for {seconds:.0f} s")

    def raise_failure(self) -> None:
        """Raises RunFailed when no batch can come together any more."""
        if self._error is not None:
            raise self._error
        if failures := self.roster.all_failed():
            raise RunFailed(f"every engine failed: {'; '.join(failures)}")

    @property
    def unjournaled_bytes(self) -> int:
        return self._acknowledgements.unjournaled_bytes

    # ---- called by the socket ------------------------------------------------------------------------------------

    def on_message(self, peer: bytes, frames: list[bytes]) -> None:
        try:
            message = codec.decode_from_engine(frames)
            with self.changed:
                if isinstance(message, messages.Hello):
                    self._hello(peer, message)
                elif (engine := self.roster.get(peer)) is not None:
                    engine.heard = time.monotonic()
                    self._handle(engine, message, frames)
                else:
                    self.strangers += 1
                # Without HELLO a peer is a stranger, or an engine that does not know yet that the learner restarted:
                # hearing nothing it connects anew, and sends again what was not acknowledged.
        except BadMessage as error:
            self._reject(peer, error)

    def on_disconnect(self, peer: bytes) -> None:
        with self.changed:
            if (engine := self.roster.remove(peer)) is not None:
                self._gone(engine, "disconnected")

    def on_tick(self) -> None:
        with self.changed:
            self.roster.forget_unseen(self._ledger.expire(time.monotonic()))
            self.remove_silent(self._lease_seconds)
            if self.evaluation is not None:
                self.roster.forget_unseen(self.evaluation.expire(time.monotonic()))
            self.grant()

    def on_refused(self, reason: str) -> None:
        self._say(reason)

    def on_error(self, error: Exception) -> None:
        with self.changed:
            self._error = RunFailed(f"the learner's socket failed: {type(error).__name__}: {error}")
            self.changed.notify_all()

    # ---- what engines say ----------------------------------------------------------------------------------------

    def _hello(self, peer: bytes, hello: messages.Hello) -> None:
        refused = refusal(hello, self._digest, self._needs, self._socket.key_of(peer))
        if refused is None and self._claimed_by_another(hello):
            newest = self.roster.newest_incarnation(hello.producer)
            refused = messages.Refused(reason=_TAKEN_OVER.format(hello.producer, newest))
        if refused is not None:
            self._say(f"engine {short_name(hello.producer)} refused: {refused.reason}")
            self._send(peer, refused)
            self._socket.disconnect(peer)
            return
        now = time.monotonic()
        engine = Engine(
            peer, hello.producer, hello.incarnation, now, draining=self.draining, instance=hello.instance, advanced=now
        )
        known = self.roster.get(peer)
        if not len(self.roster):
            self.advanced_at = now
        self._replace(self.roster.add(engine), engine)
        received = self._ledger.hello(hello.producer, hello.running, hello.spooled, hello.version, now)
        self._send(peer, messages.Welcome(
            schema=messages.SCHEMA, run=self._run_id, version=self.version, received=tuple(received),
            broadcasts=self._broadcasts,
        ))  # fmt: skip
        self._share_window()
        self._acknowledgements.repeat(engine, received)
        if self.draining:
            self._send(peer, messages.Drain())
        if known is None:
            self._on_event(f"engine {short_name(hello.producer)} connected, {len(self.roster)} in all")

    def _claimed_by_another(self, hello: messages.Hello) -> bool:
        """An older process, or one with a copy of the spool, uses a producer id that a connected engine has."""
        if hello.incarnation != self.roster.newest_incarnation(hello.producer):
            return hello.incarnation < self.roster.newest_incarnation(hello.producer)
        peer = self.roster.peer_of(hello.producer)
        engine = self.roster.get(peer) if peer is not None else None
        return engine is not None and engine.instance != hello.instance

    def _handle(self, engine: Engine, message: messages.EngineMessage | Trajectory, frames: list[bytes]) -> None:
        match message:
            case Trajectory():
                self._trajectory(engine, message, frames)
            case messages.SampleFailed():
                self._sample_failed(engine, message)
            case messages.Progress():
                self._progress(engine, message)
            case messages.Leaving():
                self.roster.left(engine)
                # not only those it names: a grant may have crossed its farewell
                self._ledger.lost(engine.producer)
                self._gone(engine, "left")
            case messages.WeightsRequest() | messages.WeightsJoin() | messages.WeightsWanted():
                self._on_weights(engine.peer, message)
            case messages.Fatal():
                self._end(engine, message.message, f"failed: {message.message}\n{message.traceback}".rstrip())

    def _trajectory(self, engine: Engine, trajectory: Trajectory, frames: list[bytes]) -> None:
        header = trajectory.header
        if header.lease >= EVAL_LEASES:
            self.sequences.seen(header.producer, header.incarnation, header.sequence)
            self._evaluated(engine, trajectory.id, trajectory)
            return
        check_sample(header.lease, header.sample, self._ledger.group_size)
        lease = self._ledger.lease(header.lease)
        check_trajectory(trajectory, engine.producer, lease, self._limits, self._needs, self.version)
        self.received_samples += 1
        self.received_bytes += sum(map(len, frames))
        self._check_window(engine)
        self.sequences.seen(header.producer, header.incarnation, header.sequence)
        outcome = self._ledger.arrive(trajectory)
        failpoint("sample.received")
        self._acknowledgements.give(engine, trajectory.id, outcome, Arrived(*trajectory.id, frames))
        self._sample_settled(engine, header.lease, outcome)

    def _sample_failed(self, engine: Engine, message: messages.SampleFailed) -> None:
        sample = message.lease, message.sample
        if message.lease >= EVAL_LEASES:
            self._evaluated(engine, sample, None)
            return
        check_sample(*sample, self._ledger.group_size)
        if self._ledger.is_another_s(message.lease, engine.producer):
            # Its lease went to another engine, whose sample is welcome: what is lost here is lost to nobody.
            engine.unseen.pop(message.lease, None)
            self._acknowledgements.repeat(engine, [sample])
            return
        reason = drop_reason(message.reason)
        self._check_window(engine)
        outcome = self._ledger.fail(*sample, reason)
        self._acknowledgements.give(engine, sample, outcome, Failed(*sample, reason, message.detail))
        self._sample_settled(engine, message.lease, outcome)

    def _evaluated(self, engine: Engine, sample: SampleId, trajectory: Trajectory | None) -> None:
        """A sample of an evaluation; it is not journaled, and one of an evaluation that is over is not wanted."""
        evaluation = self.evaluation
        lease = evaluation.lease(sample[0]) if evaluation is not None else None
        if trajectory is not None:
            check_trajectory(trajectory, engine.producer, lease, self._limits, Capabilities(), self.version)
        if evaluation is not None and lease is not None:
            check_sample(*sample, lease.group_size)
            if trajectory is not None and (trajectory.versions != lease.version).any():
                raise BadMessage(f"sample {sample} is of another publication than {lease.version}, which is evaluated")
            evaluation.arrive(sample, trajectory)
        engine.unseen.pop(sample[0], None)
        self.advanced_at = time.monotonic()
        self._acknowledgements.repeat(engine, [sample])
        self.grant()
        self.changed.notify_all()

    def _sample_settled(self, engine: Engine, lease: int, outcome: Outcome) -> None:
        engine.unseen.pop(lease, None)
        if outcome is not Outcome.ACCEPTED:
            return
        self.advanced_at = time.monotonic()
        if not self._ledger.is_settled(lease):
            return  # nothing has changed for whoever waits for whole groups, nor for what may be granted
        self.grant()
        self.changed.notify_all()

    def _progress(self, engine: Engine, message: messages.Progress) -> None:
        self.roster.progress(engine, message)
        stalled = engine.heard - engine.advanced > self._limits.stall_seconds
        running = () if stalled else message.running
        unwanted = self._ledger.progress(engine.producer, running, message.version, engine.heard)
        if self.evaluation is not None:
            self.evaluation.renew(engine.producer, running, engine.heard + self._lease_seconds)
            unwanted = [lease for lease in unwanted if self.evaluation.lease(lease) is None]
        if unwanted:
            self._send(engine.peer, messages.Revoke(leases=tuple(unwanted)))
        if stalled and not engine.stalled:
            self._say(f"engine {short_name(engine.producer)} generates nothing; its leases are not renewed")
        engine.stalled = stalled
        if self.draining:
            self._send(engine.peer, messages.Drain())  # again: the first may have been lost
        # The answer that tells an idle engine that the learner is alive.
        self._send(engine.peer, messages.Published(version=self.version))
        self.grant()

    # ---- inside --------------------------------------------------------------------------------------------------

    def _replace(self, before: Engine | None, engine: Engine) -> None:
        """The same producer was connected elsewhere: the connection is an old one, or its process is."""
        if before is None:
            return
        self._on_gone(before.peer)
        if before.incarnation < engine.incarnation:
            reason = _TAKEN_OVER.format(engine.producer, engine.incarnation)
            self._send(before.peer, messages.Refused(reason=reason))
        self._socket.disconnect(before.peer)

    def _reject(self, peer: bytes, error: BadMessage) -> None:
        """A peer that breaks the protocol is told why and not listened to any more; the others are not concerned."""
        with self.changed:
            self.bad_messages += 1
            self._send(peer, messages.fatal(f"the learner refuses what this engine sent: {error}"))
            self._socket.disconnect(peer)
            engine = self.roster.get(peer)
            if engine is None:
                self._say(f"a peer that is no engine sent a bad message: {error}")
            else:
                # As one that left: what one peer sends must not be able to end the run of the others.
                self.roster.left(engine)
                self._ledger.lost(engine.producer)
                self._gone(engine, f"sent a bad message: {error}")

    def _end(self, engine: Engine, error: str, how: str) -> None:
        """An engine that will not come back as it is."""
        self.roster.failed(engine, error)
        self._ledger.lost(engine.producer)
        self._gone(engine, how)

    def _gone(self, engine: Engine, how: str) -> None:
        self._ledger.gone(engine.producer)
        self._on_gone(engine.peer)
        if self.evaluation is not None:
            self.evaluation.lost(engine.producer)
        self._share_window()
        self._on_event(f"engine {short_name(engine.producer)} {how}, {len(self.roster)} connected")
        self.grant()
        self.changed.notify_all()

    def _journal_failed(self, error: OSError) -> None:
        with self.changed:
            self._error = RunFailed(
                f"the journal cannot be written ({error.strerror or error}); free space on its disk and resume the run"
            )
            self.changed.notify_all()

    def _journal_stalled(self, stalled: bool) -> None:
        self._on_event(
            "no space for the journal: nothing is acknowledged, engines keep what they have, until there is"
            if stalled
            else "there is space for the journal again"
        )

    def _share_window(self) -> None:
        """Every engine gets an equal part of what all may have sent and not seen committed."""
        engines = max(1, len(self.roster))
        samples, size = self._limits.window_samples // engines, self._limits.window_bytes // engines
        self.broadcast(messages.Window(samples=max(1, samples), bytes=size))

    def _check_window(self, engine: Engine) -> None:
        """An engine that goes beyond the whole window, of which it had a part, does not look at it."""
        allowed = self._limits.window_bytes + self._socket.max_message_bytes
        if (sent := self._acknowledgements.unjournaled_of(engine.producer)) > allowed:
            raise BadMessage(f"{sent} bytes sent that are not committed, {allowed} are allowed")

    def _say(self, line: str) -> None:
        """A line that a stranger could cause at will."""
        if self._lines.allow(time.monotonic()):
            self._on_event(line)

    def _send(self, peer: bytes, message: messages.LearnerMessage) -> None:
        self._socket.send(peer, codec.encode(message))
