"""The engine's socket: a DEALER over ZeroMQ, in one thread with an event loop of its own."""

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

import zmq
from zmq.utils.monitor import parse_monitor_message

from pipeline.errors import UsageError
from pipeline.transport.base import EngineHandler
from pipeline.transport.integrity import RESET, seal, unseal
from pipeline.transport.keys import EngineKeys
from pipeline.transport.options import BACKLOG, MESSAGES_A_TURN, RETRY_SECONDS, common_options, set_options
from pipeline.transport.socket_thread import SocketThread, first_of
from pipeline.transport.watched import Watched, possible, received

_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED | _FAILED


class ZmqEngineSocket(SocketThread):
    """`EngineSocket` over a DEALER."""

    def __init__(
        self, address: str, *, max_message_bytes: int = 64 << 20, heartbeat_seconds: float = 1.0,
        tick_seconds: float = 0.1, keys: EngineKeys | None = None,
    ) -> None:  # fmt: skip
        super().__init__("engine-socket", tick_seconds)
        self.address = address
        self.max_message_bytes = max_message_bytes
        self.damaged = 0
        self.handshakes_failed = 0
        # IMMEDIATE: nothing is queued for a learner that is not there; the spool is the queue.
        self._options = common_options(address, max_message_bytes, heartbeat_seconds) | {
            zmq.IMMEDIATE: 1, zmq.RECONNECT_IVL: 100, zmq.RECONNECT_IVL_MAX: 1000,
        }  # fmt: skip
        self._keys = keys
        self._lock = threading.Lock()
        self._outbox: deque[list[bytes]] = deque()
        self._connected = False
        self._renew = asyncio.Event()

    def start(self, handler: EngineHandler) -> None:
        self._handler = handler
        self.run_until_ready(self._main, handler.on_error)

    def send(self, frames: Sequence[bytes]) -> bool:
        message = list(frames) if self._keys else seal(frames)
        with self._lock:
            if not self._connected or len(self._outbox) >= BACKLOG:
                return False
            self._outbox.append(message)
            sending = len(self._outbox) > 1
        return sending or self.call(self._look)

    def reconnect(self) -> None:
        self.call(self._renew.set)

    def stop(self, linger_seconds: float) -> None:
        self.stop_thread(linger_seconds)

    async def _main(self, ready: Future) -> None:
        context = zmq.Context()
        try:
            self._connect(context)
            ready.set_result(None)
            await first_of(self.stopping.wait(), self._sessions(context), self.tick(self._handler.on_tick))
            await self._drain()
        finally:
            context.destroy(linger=int(self.linger * 1000))

    def _connect(self, context: zmq.Context) -> None:
        self._socket = context.socket(zmq.DEALER)
        set_options(self._socket, self._options)
        if self._keys is not None:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, self._keys.learner_public)
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.public)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret)
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        try:
            self._socket.connect(self.address)
        except zmq.ZMQError as error:
            raise UsageError(f"cannot connect to {self.address}: {error.strerror}; set transport.address") from error
        self._messages = Watched(self._socket, self._exchange)

    async def _sessions(self, context: zmq.Context) -> None:
        """One socket after another, whenever a new connection is asked for."""
        while True:
            self._renew.clear()
            await first_of(self._renew.wait(), self._messages.run(), Watched(self._monitor, self._follow).run())
            self._lose()
            self._socket.disable_monitor()
            self._socket.close(linger=0)
            self._connect(context)

    def _look(self) -> None:
        """There may be something to send."""
        self._messages.turn()

    def _exchange(self) -> bool:
        """Send and receive what is possible now, up to a bound; whether there may be more."""
        self._send_outbox()
        if not self._receive():
            self._renew.set()
            return False
        events = possible(self._socket)
        return bool(events & zmq.POLLIN or (self._outbox and events & zmq.POLLOUT))

    def _receive(self) -> bool:
        """False when a message was damaged on the way, or the learner says that one of ours was."""
        for _ in range(MESSAGES_A_TURN):
            if self._renew.is_set() or (frames := received(self._socket)) is None:
                break
            if self._keys is None:
                whole = unseal(frames) if frames != RESET else None
                if whole is None:
                    self.damaged += 1
                    return False
                frames = whole
            self._handler.on_message(frames)
        return True

    def _send_outbox(self) -> None:
        for _ in range(MESSAGES_A_TURN):
            if not self._outbox:
                return
            frames = self._outbox[0]
            try:
                self._socket.send_multipart(frames, zmq.DONTWAIT)
            except zmq.Again:
                return
            with self._lock:
                if self._outbox and self._outbox[0] is frames:
                    self._outbox.popleft()

    def _follow(self) -> bool:
        """Take note of connections made and lost; whether there may be more to note."""
        while (message := received(self._monitor)) is not None:
            event = parse_monitor_message(message)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                with self._lock:
                    self._outbox.clear()
                    self._connected = True
                self._handler.on_connect()
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._handler.on_refused()
            elif event & _FAILED:
                self.handshakes_failed += 1
            elif event == zmq.EVENT_DISCONNECTED:
                self._lose()
        return False

    async def _drain(self) -> None:
        deadline = self.loop.time() + self.linger
        while self._outbox and self.loop.time() < deadline:
            self._send_outbox()
            await asyncio.sleep(RETRY_SECONDS if self._outbox else 0)

    def _lose(self) -> None:
        with self._lock:
            was, self._connected = self._connected, False
            self._outbox.clear()
        if was:
            self._handler.on_disconnect()
