"""The engine's side of the wire: leases in, samples out, and the same engine still when the learner restarts.

The main loop polls events, submits samples and says how it stands; the socket's thread talks to the learner. Whenever
a connection comes up the link says HELLO, and after WELCOME it sends what is in the spool and was not received.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

from msgspec import structs

from pipeline import messages
from pipeline.engine.link_events import Drained, Event, Failed, Granted, Revoked, VersionHint
from pipeline.engine.outbox import Outbox
from pipeline.errors import UsageError
from pipeline.messages import IDS_A_MESSAGE, SCHEMA, BadMessage, Capabilities, Trajectory, encode, encode_trajectory
from pipeline.transport.base import EngineSocket
from pipeline.transport.spool import Spool

__all__ = ["Drained", "Event", "Failed", "Granted", "Link", "LinkStats", "Revoked", "VersionHint"]

_SILENT_HEARTBEATS = 5
_NOTICE_SECONDS, _NOTICE_SECONDS_MOST = 1.0, 30.0
"""between lines about waiting; longer the longer it lasts"""
_LINGER_SECONDS = 2.0
_OVERDUE_HEARTBEATS = 10
"""after which a sample that was sent and is not committed is asked after"""
_GRANTS_BEYOND = 4
"""times the credit that the leases held at once may be worth; a learner that grants more is out of order"""


@dataclass(frozen=True, slots=True)
class LinkStats:
    connected: bool
    queued: int
    """samples that wait for the spool"""
    spooled: int
    """samples in the spool that are not known to be committed"""
    spooled_bytes: int
    sent_bytes: int
    """sent and not committed"""
    blocked_seconds: float
    """that nothing new was taken because the spool was full"""
    damaged_messages: int
    spool_damaged: int
    """stretches of the spool that could not be read"""


class Link:
    """Owns its socket and spool. `update` and `poll` are for one thread, the rest may be called from any."""

    def __init__(
        self,
        socket: EngineSocket,
        spool: Spool,
        *,
        digest: dict[str, str],
        capabilities: Capabilities,
        heartbeat_seconds: float,
        connect_timeout: float,
        on_event: Callable[[str], None],
        on_weights: Callable[[messages.WeightsFiles | messages.WeightsChunk], None] = lambda message: None,
    ) -> None:
        """
        Args:
            socket: not started.
            digest: what engine and learner must agree on.
            heartbeat_seconds: between progress messages; the learner is lost after five without a word.
            connect_timeout: seconds to wait for the learner, at first and whenever it is lost; 0: for ever.
            on_event: gets a line about the connection; from any thread.
            on_weights: gets the answers to `request_weights`; from the socket's thread, must not block.
        """
        self._socket, self._spool = socket, spool
        self._digest, self._capabilities = digest, capabilities
        self._heartbeat_seconds, self._connect_timeout, self._on_event = heartbeat_seconds, connect_timeout, on_event
        self._on_weights = on_weights
        self._outbox = Outbox(socket, spool, self._spool_failed, on_event)
        self._instance = int.from_bytes(os.urandom(7))
        self._changed = threading.Condition(threading.RLock())
        self._events: deque[Event] = deque()
        self._unpolled: set[int] = set()
        self._running: set[int] = set()
        self._standing = messages.Progress(running=(), credit=0, version=-1)
        self._sent = self._standing
        self._sent_at = self._heard_at = self._hello_at = self._waiting_since = self._noticed_at = time.monotonic()
        self._group_size = 1
        self._most_credit = 0
        self._had_room, self._room_noticed_at = True, 0.0
        self._sequence = 0
        self._hint = -1
        self._welcomed = False
        self._run = ""
        self._failed = False
        self._leaving: messages.Leaving | None = None
        self._left = False

    @property
    def run(self) -> str:
        """Identity of the learner's run; empty before the first WELCOME."""
        return self._run

    # ---- for the main loop ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect, and keep trying; failing to is an event.

        Raises:
            UsageError: the address is not one.
        """
        if self._spool.pending():
            self._on_event(f"{len(self._spool.pending())} samples of an earlier engine are in {self._spool.folder}")
        if self._spool.corrupt:
            self._on_event(
                f"{self._spool.folder} has {self._spool.corrupt} damaged stretches; what was in them is sampled anew"
            )
        self._waiting_since = self._noticed_at = time.monotonic()
        self._outbox.start()
        self._socket.start(self)

    def poll(self, timeout: float) -> list[Event]:
        """Events so far; waits at most `timeout` seconds for the first."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._events), timeout)
            events = list(self._events)
            self._events.clear()
            self._unpolled.clear()
            return events

    def update(
        self, running: Collection[int], credit: int, version: int, generated_tokens: int, busy_seconds: float
    ) -> None:
        """How the engine stands; cheap, to be called every step.

        Args:
            running: leases it works on, up to the call of `submit` for their samples.
            credit: samples it could start now, beyond those leases; the learner hears of none while the spool is full.
            version: publication loaded, -1 before the first.
            generated_tokens: since the engine's start.
            busy_seconds: that the generator ran since the engine's start.
        """
        has_room = self._outbox.has_room
        credit = credit if has_room else 0
        with self._changed:
            turned = has_room != self._had_room
            self._note_room(has_room)
            self._most_credit = max(self._most_credit, credit)
            self._running = set(running) | self._unpolled
            self._standing = messages.Progress(
                running=tuple(self._running), credit=credit, version=version,
                generated_tokens=generated_tokens, busy_seconds=busy_seconds,
            )  # fmt: skip
            finished = not set(self._sent.running) <= self._running
            more = credit - self._sent.credit >= self._group_size
            if finished or more or turned or version != self._sent.version:
                self._send_progress()

    def submit(self, trajectory: Trajectory) -> None:
        """Send a sample; producer, incarnation and sequence of its header are filled in. Does not wait: while the
        spool is full the sample is kept in memory, and `update` lets nothing new be leased.

        Raises:
            UsageError: the sample is too large to be sent.
        """
        with self._changed:
            header = structs.replace(
                trajectory.header, producer=self._spool.producer, incarnation=self._spool.incarnation,
                sequence=self._sequence,
            )  # fmt: skip
            self._sequence += 1
        frames = encode_trajectory(structs.replace(trajectory, header=header))
        if (largest := max(map(len, frames))) > self._socket.max_message_bytes:
            raise UsageError(
                f"sample {trajectory.id} takes {largest} bytes, more than transport.max_message_bytes "
                f"{self._socket.max_message_bytes}; raise it"
            )
        self._outbox.put(trajectory.id, frames)

    def fail_sample(self, lease: int, sample: int, reason: str, detail: str) -> None:
        """A sample will not come; the learner counts it as dropped for `reason`."""
        message = messages.SampleFailed(lease=lease, sample=sample, reason=reason, detail=detail)
        self._outbox.put((lease, sample), encode(message))

    def leave(self, handed_back: Collection[int]) -> None:
        """No more leases; those named go back. The learner is told once everything submitted is safe with it, or at
        `stop`."""
        with self._changed:
            self._leaving = messages.Leaving(handed_back=tuple(handed_back))
            self._standing = structs.replace(self._standing, credit=0)
            self._send_progress()

    def flush(self, timeout: float) -> bool:
        """Wait until everything submitted is committed; False after `timeout` seconds, or when the learner is away."""
        return self._outbox.wait_until_empty(timeout)

    def fatal(self, message: str, traceback: str = "") -> None:
        """Tell the learner that the engine ends by an error; `stop` gives the message its time to arrive."""
        self._socket.send(encode(messages.fatal(message, traceback)))
        with self._changed:
            self._leaving = None

    def stop(self) -> None:
        """Say that we leave, if `leave` was called, and close; what is not committed stays in the spool."""
        self._outbox.stop()
        with self._changed:
            if self._leaving is not None:
                self._socket.send(encode(self._leaving))
            self._left = True
        self._socket.stop(_LINGER_SECONDS)
        self._spool.close()

    def stats(self) -> LinkStats:
        outbox = self._outbox.stats()
        return LinkStats(
            self._welcomed, outbox.queued, outbox.spooled, outbox.spooled_bytes, outbox.sent_bytes,
            outbox.blocked_seconds, self._socket.damaged, self._spool.corrupt,
        )  # fmt: skip

    def request_weights(self, request: messages.WeightsRequest) -> bool:
        """Ask the learner for a publication; False when it is not connected now."""
        with self._changed:
            return self._welcomed and self._socket.send(encode(request))

    # ---- called by the socket ------------------------------------------------------------------------------------

    def on_connect(self) -> None:
        with self._changed:
            self._heard_at = time.monotonic()
            self._lose_learner("connected anew")
            self._say_hello()

    def on_disconnect(self) -> None:
        with self._changed:
            self._lose_learner("disconnected")

    def on_message(self, frames: list[bytes]) -> None:
        try:
            message = messages.decode_from_learner(frames)
        except BadMessage as error:
            self._fail(f"{self._socket.address} does not answer like a learner of this version: {error}", refused=True)
            return
        with self._changed:
            self._heard_at = time.monotonic()
            self._handle(message)

    def on_tick(self) -> None:
        now = time.monotonic()
        with self._changed:
            if self._failed or self._left:
                return
            if now - self._heard_at > _SILENT_HEARTBEATS * self._heartbeat_seconds:
                self._heard_at = now
                self._lose_learner("silent")
                self._socket.reconnect()
            if not self._welcomed:
                self._wait_for_learner(now)
            elif now - self._hello_at > (wait := _OVERDUE_HEARTBEATS * self._heartbeat_seconds) and (
                self._outbox.overdue(wait)
            ):
                self._say_hello()  # the answer says what has to be sent again
            elif now - self._sent_at >= self._heartbeat_seconds:
                self._send_progress()

    def on_refused(self) -> None:
        self._fail(
            f"the learner at {self._socket.address} does not list this engine's key; add the public key to its "
            "engines.allow, or use a key that `rollahead keygen` listed", refused=True,
        )  # fmt: skip

    def on_error(self, error: Exception) -> None:
        self._fail(f"the engine's socket failed: {type(error).__name__}: {error}", refused=False)

    # ---- what the learner says -----------------------------------------------------------------------------------

    def _handle(self, message: messages.LearnerMessage) -> None:
        match message:
            case messages.Welcome():
                self._welcome(message)
            case messages.Refused(reason=reason):
                self._fail(f"the learner at {self._socket.address} refused this engine: {reason}", refused=True)
            case messages.Grant(leases=leases):
                ids = {lease.id for lease in leases}
                if len(self._running | ids) > _GRANTS_BEYOND * self._most_credit + len(ids):
                    self._fail("the learner grants far more leases than were asked for", refused=False)
                    return
                self._group_size = leases[0].group_size if leases else self._group_size
                self._unpolled |= ids
                self._running |= ids
                self._standing = structs.replace(self._standing, running=tuple(self._running))
                self._emit(Granted(leases))
            case messages.Committed(samples=samples):
                self._outbox.committed(samples)
                self._leave_when_empty()
            case messages.Published(version=version):
                self._hint_at(version)
            case messages.Window(samples=samples, bytes=size):
                self._outbox.set_window(samples, size)
            case messages.WeightsFiles() | messages.WeightsChunk():
                self._on_weights(message)
            case messages.Revoke(leases=leases):
                self._emit(Revoked(leases))
            case messages.Drain():
                self._emit(Drained())
            case messages.Fatal(message=text, traceback=trace):
                if trace:
                    self._on_event(f"the learner's traceback:\n{trace.rstrip()}")
                self._fail(f"the learner failed: {text}", refused=False)

    def _welcome(self, message: messages.Welcome) -> None:
        if message.schema != SCHEMA:
            reason = (
                f"the learner speaks message schema {message.schema}, the engine {SCHEMA}; install the same version"
            )
            self._fail(reason, refused=True)
            return
        if (self._run or self._spool.pending()) and self._spool.run not in ("", message.run):
            self._fail(
                f"the learner at {self._socket.address} serves run {message.run}, the samples in {self._spool.folder} "
                f"belong to run {self._spool.run}; connect to that run's learner or delete the folder", refused=True,
            )  # fmt: skip
            return
        self._spool.bind(message.run)
        self._run = message.run
        if not self._welcomed:
            self._on_event(f"connected to the learner at {self._socket.address}")
        self._welcomed = True
        self._outbox.connected(message.received)
        self._hint_at(message.version)
        self._send_progress()
        self._leave_when_empty()

    # ---- inside --------------------------------------------------------------------------------------------------

    def _wait_for_learner(self, now: float) -> None:
        waited = now - self._waiting_since
        if self._connect_timeout and waited > self._connect_timeout:
            self._fail(
                f"no learner at {self._socket.address} for {waited:.0f} s; start it or raise transport.connect_timeout",
                refused=False,
            )
        elif now - self._noticed_at >= min(max(_NOTICE_SECONDS, waited / 2), _NOTICE_SECONDS_MOST):
            self._noticed_at = now
            failed = self._socket.handshakes_failed
            keys = f"; {failed} handshakes failed: see that both sides use keys of one folder" if failed else ""
            self._on_event(f"waiting for the learner at {self._socket.address}, {waited:.0f} s{keys}")

    def _lose_learner(self, how: str) -> None:
        """From here on until WELCOME nothing is sent but HELLO."""
        self._outbox.disconnected()
        if self._welcomed and not self._left:
            self._welcomed = False
            self._waiting_since = self._noticed_at = time.monotonic()
            self._on_event(f"lost the learner at {self._socket.address} ({how}); waiting for it")

    def _say_hello(self) -> None:
        self._hello_at = time.monotonic()
        self._socket.send(encode(messages.Hello(
            schema=SCHEMA, producer=self._spool.producer, incarnation=self._spool.incarnation,
            digest=self._digest, capabilities=self._capabilities, running=self._working_on(),
            spooled=tuple(self._spool.pending()[:IDS_A_MESSAGE]), version=self._standing.version,
            instance=self._instance,
        )))  # fmt: skip

    def _working_on(self) -> tuple[int, ...]:
        return tuple(self._running | self._outbox.leases())[:IDS_A_MESSAGE]

    def _note_room(self, has_room: bool) -> None:
        """Say, not too often, that the spool is full."""
        now = time.monotonic()
        if not has_room and self._had_room and now - self._room_noticed_at > _NOTICE_SECONDS_MOST:
            self._room_noticed_at = now
            self._on_event(
                f"the spool {self._spool.folder} is full ({self._spool.size} bytes, engine.spool_bytes): nothing new "
                "is sampled until the learner has committed what is in it"
            )
        self._had_room = has_room

    def _send_progress(self) -> None:
        if not self._welcomed:
            return
        progress = structs.replace(
            self._standing, running=self._working_on(), spooled_bytes=self._spool.size,
            blocked_seconds=self._outbox.stats().blocked_seconds, spool_damaged=self._spool.corrupt,
        )  # fmt: skip
        if self._socket.send(encode(progress)):
            self._sent, self._sent_at = self._standing, time.monotonic()

    def _leave_when_empty(self) -> None:
        """Everything is safe: the learner need not wait for us any longer."""
        if (
            self._leaving is not None
            and self._outbox.wait_until_empty(0.0)
            and self._socket.send(encode(self._leaving))
        ):
            self._leaving, self._left = None, True

    def _hint_at(self, version: int) -> None:
        if version > self._hint:
            self._hint = version
            self._emit(VersionHint(version))

    def _emit(self, event: Event) -> None:
        self._events.append(event)
        self._changed.notify_all()

    def _spool_failed(self, reason: str) -> None:
        self.fatal(reason)
        self._fail(reason, refused=False)

    def _fail(self, message: str, refused: bool) -> None:
        with self._changed:
            if self._failed:
                return
            self._failed = True
            self._outbox.fail()
            self._emit(Failed(message, refused))
