"""The engine's conversation with the learner: HELLO and WELCOME, leases in, progress out, and silence.

Called in the socket's thread for what the learner says, in the main loop's for how the engine stands.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping

from msgspec import structs

from pipeline import codec, messages
from pipeline.codec import encode
from pipeline.engine.link_events import Drained, Event, Failed, Granted, Revoked, VersionHint
from pipeline.engine.outbox import Outbox
from pipeline.messages import IDS_A_MESSAGE, SCHEMA, BadMessage, Capabilities
from pipeline.transport.base import EngineSocket
from pipeline.transport.spool import Spool

_SILENT_HEARTBEATS = 5
_NOTICE_SECONDS, _NOTICE_SECONDS_MOST = 1.0, 30.0
"""between lines about waiting; longer the longer it lasts"""
_OVERDUE_HEARTBEATS = 10
"""after which a sample that was sent and is not committed is asked after"""
_GRANTS_BEYOND = 4
"""times the credit that the leases held at once may be worth; a learner that grants more is out of order"""


class Session:
    """The handler of the engine's socket; its methods may be called from any thread."""

    def __init__(
        self,
        socket: EngineSocket,
        spool: Spool,
        outbox: Outbox,
        *,
        digest: dict[str, str],
        capabilities: Capabilities,
        heartbeat_seconds: float,
        connect_timeout: float,
        on_event: Callable[[str], None],
        on_weights: Callable[[messages.WeightsAnswer], None],
    ) -> None:
        """Arguments as of `pipeline.engine.link.Link`."""
        self._socket, self._spool, self._outbox = socket, spool, outbox
        self._digest, self._capabilities = digest, capabilities
        self._heartbeat_seconds, self._connect_timeout, self._on_event = heartbeat_seconds, connect_timeout, on_event
        self._on_weights = on_weights
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
        self._hint = -1
        self._failed = False
        self._leaving: messages.Leaving | None = None
        self._left = False
        self.welcomed = False
        """the learner has answered HELLO on this connection"""
        self.run = ""
        """identity of its run"""
        self.broadcasts = False
        """whether it broadcasts weights to engines that ask for a group"""
        self.connections = 0
        """so far; what was asked on an earlier one is not answered"""

    # ---- for the link --------------------------------------------------------------------------------------------

    def begin_waiting(self) -> None:
        """From now on the learner is waited for."""
        self._waiting_since = self._noticed_at = time.monotonic()

    @property
    def has_events(self) -> bool:
        """Whether `events` would return at once, with some."""
        return bool(self._events)

    def events(self, timeout: float) -> list[Event]:
        """Events so far; waits at most `timeout` seconds for the first."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._events), timeout)
            events = list(self._events)
            self._events.clear()
            self._unpolled.clear()
            return events

    def update(
        self,
        running: Collection[int],
        credit: int,
        version: int,
        generated_tokens: int,
        busy_seconds: float,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        """As `Link.update`."""
        has_room = self._outbox.has_room
        credit = credit if has_room else 0
        with self._changed:
            turned = has_room != self._had_room
            self._note_room(has_room)
            self._most_credit = max(self._most_credit, credit)
            self._running = set(running) | self._unpolled
            self._standing = messages.Progress(
                running=tuple(self._running), credit=credit, version=version,
                generated_tokens=generated_tokens, busy_seconds=busy_seconds, seconds=dict(seconds or {}),
            )  # fmt: skip
            finished = not set(self._sent.running) <= self._running
            more = credit - self._sent.credit >= self._group_size
            if finished or more or turned or version != self._sent.version:
                self._send_progress()

    def leave(self, handed_back: Collection[int]) -> None:
        """Ask for nothing more; say farewell once everything is safe."""
        with self._changed:
            self._leaving = messages.Leaving(handed_back=tuple(handed_back))
            self._standing = structs.replace(self._standing, credit=0)
            self._send_progress()

    def stay(self) -> None:
        """No farewell: the engine does not leave in order."""
        with self._changed:
            self._leaving = None

    def end(self) -> None:
        """The last word, if one is due; what comes after is ignored."""
        with self._changed:
            if self._leaving is not None:
                self._socket.send(encode(self._leaving))
            self._left = True

    def send(self, message: messages.Message) -> bool:
        """Send to a learner that has welcomed us; False when there is none now."""
        with self._changed:
            return self.welcomed and self._socket.send(encode(message))

    def fail(self, message: str, refused: bool) -> None:
        """The link is dead; the main loop hears of it."""
        with self._changed:
            if self._failed:
                return
            self._failed = True
            self._outbox.fail()
            self._emit(Failed(message, refused))

    # ---- called by the socket ------------------------------------------------------------------------------------

    def on_connect(self) -> None:
        with self._changed:
            self.connections += 1
            self._heard_at = time.monotonic()
            self._lose_learner("connected anew")
            self._say_hello()

    def on_disconnect(self) -> None:
        with self._changed:
            self._lose_learner("disconnected")

    def on_message(self, frames: list[bytes]) -> None:
        try:
            message = codec.decode_from_learner(frames)
        except BadMessage as error:
            self.fail(f"{self._socket.address} does not answer like a learner of this version: {error}", refused=True)
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
            if not self.welcomed:
                self._wait_for_learner(now)
            elif now - self._hello_at > (wait := _OVERDUE_HEARTBEATS * self._heartbeat_seconds) and (
                self._outbox.overdue(wait)
            ):
                self._say_hello()  # the answer says what has to be sent again
            elif now - self._sent_at >= self._heartbeat_seconds:
                self._send_progress()

    def on_refused(self) -> None:
        self.fail(
            f"the learner at {self._socket.address} does not list this engine's key; add the public key to its "
            "engines.allow, or use a key that `rollahead keygen` listed", refused=True,
        )  # fmt: skip

    def on_error(self, error: Exception) -> None:
        self.fail(f"the engine's socket failed: {type(error).__name__}: {error}", refused=False)

    # ---- what the learner says -----------------------------------------------------------------------------------

    def _handle(self, message: messages.LearnerMessage) -> None:
        match message:
            case messages.Welcome():
                self._welcome(message)
            case messages.Refused(reason=reason):
                self.fail(f"the learner at {self._socket.address} refused this engine: {reason}", refused=True)
            case messages.Grant(leases=leases):
                ids = {lease.id for lease in leases}
                if len(self._running | ids) > _GRANTS_BEYOND * self._most_credit + len(ids):
                    self.fail("the learner grants far more leases than were asked for", refused=False)
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
            case (
                messages.WeightsFiles() | messages.WeightsChunk() | messages.WeightsGroup()
                | messages.WeightsManifest() | messages.WeightsClosed()
            ):  # fmt: skip
                self._on_weights(message)
            case messages.Revoke(leases=leases):
                self._emit(Revoked(leases))
            case messages.Drain():
                self._emit(Drained())
            case messages.Fatal(message=text, traceback=trace):
                if trace:
                    self._on_event(f"the learner's traceback:\n{trace.rstrip()}")
                self.fail(text, refused=False)

    def _welcome(self, message: messages.Welcome) -> None:
        if message.schema != SCHEMA:
            reason = (
                f"the learner speaks message schema {message.schema}, the engine {SCHEMA}; install the same version"
            )
            self.fail(reason, refused=True)
            return
        if (self.run or self._spool.pending()) and self._spool.run not in ("", message.run):
            self.fail(
                f"the learner at {self._socket.address} serves run {message.run}, the samples in {self._spool.folder} "
                f"belong to run {self._spool.run}; connect to that run's learner or delete the folder", refused=True,
            )  # fmt: skip
            return
        try:
            self._spool.bind(message.run)
        except OSError as error:
            self.fail(
                f"the spool {self._spool.folder} cannot be written ({error.strerror or error}); free space on its disk "
                "and start the engine again", refused=False,
            )  # fmt: skip
            return
        self.run, self.broadcasts = message.run, message.broadcasts
        if not self.welcomed:
            self._on_event(f"connected to the learner at {self._socket.address}")
        self.welcomed = True
        self._outbox.connected(message.received)
        self._hint_at(message.version)
        self._send_progress()
        self._leave_when_empty()

    # ---- inside --------------------------------------------------------------------------------------------------

    def _wait_for_learner(self, now: float) -> None:
        waited = now - self._waiting_since
        if self._connect_timeout and waited > self._connect_timeout:
            self.fail(
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
        if self.welcomed and not self._left:
            self.welcomed = False
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
        if not self.welcomed:
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
