"""The learner's socket: a ROUTER over ZeroMQ, in one thread with an event loop of its own.

Peers get the routing ids that ZeroMQ assigns to connections; nothing a peer says about itself is used for routing.
Liveness below the messages is ZeroMQ's own heartbeat, which its I/O thread answers whatever Python is doing.
"""

import asyncio
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, cast

import zmq
from zmq.utils.monitor import parse_monitor_message

from pipeline.errors import UsageError
from pipeline.messages import LARGEST_HEADER
from pipeline.transport.base import LearnerHandler
from pipeline.transport.gatekeeper import Gatekeeper
from pipeline.transport.integrity import RESET, seal, unseal
from pipeline.transport.keys import LearnerKeys, fingerprint
from pipeline.transport.options import (
    BACKLOG,
    BACKLOG_BYTES,
    MESSAGES_A_TURN,
    RETRY_SECONDS,
    answers,
    check_listening,
    common_options,
    set_options,
)
from pipeline.transport.socket_thread import SocketThread, first_of
from pipeline.transport.unfinished import UnfinishedMessages
from pipeline.transport.watched import Watched, possible, received

_REMEMBERED_PEERS = 4096
_REFUSALS = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "key_not_listed",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "no_key_or_wrong_key",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "broken_handshake",
}


class ZmqLearnerSocket(SocketThread):
    """`LearnerSocket` over a ROUTER."""

    def __init__(
        self, address: str, *, max_message_bytes: int = 64 << 20, heartbeat_seconds: float = 1.0,
        tick_seconds: float = 0.25, keys: LearnerKeys | None = None, insecure: bool = False,
        warn: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        """
        Args:
            keys: encrypt, and let in whom they list; None: plain, on this machine only.
            insecure: allow a plain socket that other machines reach; said through `warn`.
        """
        super().__init__("learner-socket", tick_seconds)
        self.address = address
        self.max_message_bytes = max_message_bytes
        self.sends_lost = 0
        self.damaged = 0
        self.refused: Counter[str] = Counter()
        self._keys, self._insecure, self._warn = keys, insecure, warn
        self._options = common_options(address, max_message_bytes, heartbeat_seconds) | {zmq.ROUTER_MANDATORY: 1}
        self._most_bytes = max_message_bytes + LARGEST_HEADER
        """of the frames of one message together"""
        self._lock = threading.Lock()
        self._backlogs: dict[bytes, _Backlog] = {}
        self._disconnected: OrderedDict[bytes, None] = OrderedDict()
        self._peer_keys: OrderedDict[bytes, str] = OrderedDict()
        self._flush_due = False

    def start(self, handler: LearnerHandler) -> None:
        self._handler = handler
        check_listening(self.address, self._keys is not None, self._insecure, self._warn)
        self.run_until_ready(self._main, handler.on_error)

    def send(self, peer: bytes, frames: Sequence[bytes]) -> None:
        message = list(frames) if self._keys or frames is RESET else seal(frames)
        with self._lock:
            self._backlogs.setdefault(peer, _Backlog()).append(message)
            due, self._flush_due = self._flush_due, True
        if not due and not self.call(self._flush):
            self.sends_lost += 1

    def waiting(self, peer: bytes) -> int:
        with self._lock:
            return backlog.bytes if (backlog := self._backlogs.get(peer)) is not None else 0

    def disconnect(self, peer: bytes) -> None:
        with self._lock:
            forgotten = _remember(self._disconnected, peer, None)
        if forgotten is not None:  # which would be listened to again
            self.call(partial(self._unfinished.end, forgotten))

    def key_of(self, peer: bytes) -> str:
        with self._lock:
            return self._peer_keys.get(peer, "")

    def stop(self, linger_seconds: float) -> None:
        self.stop_thread(linger_seconds)

    async def _main(self, ready: Future) -> None:
        context = zmq.Context()
        self._socket = context.socket(zmq.ROUTER)
        set_options(self._socket, self._options)
        self._monitor = self._socket.get_monitor_socket(sum(_REFUSALS) | zmq.EVENT_ACCEPTED)
        self._messages = Watched(self._socket, self._receive)
        connections = Watched(self._monitor, self._follow)
        gatekeeper = Gatekeeper(context, self._keys, self._handler.on_refused) if self._keys else None
        try:
            if gatekeeper is not None:
                gatekeeper.guard(self._socket)
            self._bind()
            self._unfinished = UnfinishedMessages(_port(self.address), LARGEST_HEADER, self._most_bytes)
            ready.set_result(None)
            await first_of(self.stopping.wait(), self._messages.run(), connections.run(), self.tick(self._on_tick))
            await self._drain()
        finally:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=int(self.linger * 1000))
            if gatekeeper is not None:
                gatekeeper.stop()
            context.term()

    def _bind(self) -> None:
        address = self.address.replace("tcp://localhost:", "tcp://127.0.0.1:")
        try:
            if address.startswith("ipc://") and answers(address.removeprefix("ipc://")):
                raise zmq.ZMQError(zmq.EADDRINUSE)  # ZeroMQ would take the file over without a word
            self._socket.bind(address)
        except zmq.ZMQError as error:
            if error.errno == zmq.EADDRINUSE:
                raise UsageError(
                    f"cannot listen on {self.address}: the address is in use; stop the program that holds it or set "
                    "transport.address to another port"
                ) from error
            raise UsageError(f"cannot listen on {self.address}: {error.strerror}; set transport.address") from error
        self.address = cast(bytes, self._socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()

    def _receive(self) -> bool:
        """Take messages that are there, up to a bound; whether there may be more."""
        for _ in range(MESSAGES_A_TURN):
            try:
                peer_frame, *parts = self._socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                break
            peer, frames = peer_frame.bytes, [part.bytes for part in parts]
            if parts:
                self._unfinished.delivered(_descriptor(parts[0]), peer)
            if self._keys is None:
                self._take(peer, unseal(frames))
            else:
                self._learn_key(peer, parts)
                self._take(peer, frames)
        return bool(possible(self._socket) & zmq.POLLIN)

    def _take(self, peer: bytes, frames: list[bytes] | None) -> None:
        with self._lock:
            ignored = peer in self._disconnected
        if ignored:
            return
        if frames is None:
            self.damaged += 1
            self.disconnect(peer)
            self.send(peer, RESET)
            self._handler.on_disconnect(peer)
        else:
            self._handler.on_message(peer, frames)

    def _learn_key(self, peer: bytes, parts: list[zmq.Frame]) -> None:
        """Which key a connection was opened with; it cannot change while the connection lasts."""
        if peer in self._peer_keys or not parts:
            return
        key = cast(str, parts[0].get("User-Id"))
        with self._lock:
            _remember(self._peer_keys, peer, fingerprint(key.encode()))

    def _on_tick(self) -> None:
        if ended := self._unfinished.cut():
            self.refused["endless_message"] += ended
            self._handler.on_refused(f"{ended} connections were cut: a message that is too long to be one, or endless")
        self._handler.on_tick()

    def _follow(self) -> bool:
        """Take note of connections that are opened, count those that did not come about; whether there may be more."""
        while (frames := received(self._monitor)) is not None:
            message = parse_monitor_message(frames)
            event = message["event"]
            if event == zmq.EVENT_ACCEPTED:
                self._unfinished.accepted(message["value"])
            elif reason := _REFUSALS.get(zmq.Event(event)):
                self.refused[reason] += 1
                if reason != "key_not_listed":  # which the gatekeeper tells, with the key
                    self._handler.on_refused(f"a connection was refused: {reason.replace('_', ' ')}")
        return False

    async def _drain(self) -> None:
        deadline = self.loop.time() + self.linger
        while self._backlogs and self.loop.time() < deadline:
            await asyncio.sleep(RETRY_SECONDS)

    def _flush(self) -> None:
        """Send what each peer takes; a full peer is tried again later and holds up nobody."""
        gone = []
        with self._lock:
            self._flush_due = False
            for peer, backlog in list(self._backlogs.items()):
                if not self._send_backlog(peer, backlog):
                    gone.append(peer)
                    self.sends_lost += len(backlog.messages)
                if peer in gone or not backlog.messages:
                    del self._backlogs[peer]
            if self._backlogs and not self._flush_due:
                self._flush_due = True
                self.loop.call_later(RETRY_SECONDS, self._flush)
        for peer in gone:
            self._handler.on_disconnect(peer)
        self._messages.turn()  # sending may have used up what the descriptor had to tell

    def _send_backlog(self, peer: bytes, backlog: "_Backlog") -> bool:
        """False when the peer is gone or hopelessly behind."""
        while backlog.messages:
            try:
                self._socket.send_multipart([peer, *backlog.messages[0]], zmq.DONTWAIT)
            except zmq.Again:
                return len(backlog.messages) <= BACKLOG and backlog.bytes <= BACKLOG_BYTES + self.max_message_bytes
            except zmq.ZMQError:
                return False
            backlog.pop()
        return True


def _descriptor(frame: zmq.Frame) -> int:
    """The connection that a frame came on; -1 where ZeroMQ does not say, as for peers of its first protocol."""
    try:
        return frame.get(zmq.SRCFD)
    except zmq.ZMQError:
        return -1


def _port(address: str) -> int:
    """0 for an address that is no TCP."""
    scheme, _, rest = address.partition("://")
    return int(rest.rpartition(":")[2]) if scheme == "tcp" else 0


class _Backlog:
    """Messages for one peer that ZeroMQ has not taken, oldest first."""

    def __init__(self) -> None:
        self.messages: deque[list[bytes]] = deque()
        self.bytes = 0

    def append(self, message: list[bytes]) -> None:
        self.messages.append(message)
        self.bytes += sum(map(len, message))

    def pop(self) -> None:
        self.bytes -= sum(map(len, self.messages.popleft()))


def _remember(known: OrderedDict[bytes, Any], peer: bytes, value: Any) -> bytes | None:
    """Returns the peer that is forgotten for it."""
    known[peer] = value
    return known.popitem(last=False)[0] if len(known) > _REMEMBERED_PEERS else None
