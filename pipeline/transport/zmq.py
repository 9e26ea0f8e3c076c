"""ROUTER (learner) and DEALER (engine) over ZeroMQ, each in one thread with an event loop of its own.

Peers get the routing ids that ZeroMQ assigns to connections; nothing a peer says about itself is used for routing.
Liveness below the messages is ZeroMQ's own heartbeat, which its I/O thread answers whatever Python is doing.
"""

import asyncio
import contextlib
import ipaddress
import socket as stdlib_socket
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import cast

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from pipeline.errors import UsageError
from pipeline.transport.base import EngineHandler, LearnerHandler
from pipeline.transport.socket_thread import SocketThread, first_of

_HIGH_WATER_MARK = 64
_BACKLOG = 4096
"""messages queued for one peer beyond what ZeroMQ takes; a peer that lets so many wait is given up"""
_RETRY_SECONDS = 0.02
_MESSAGES_A_TURN = 32
_REMEMBERED_DISCONNECTS = 4096


def require_loopback(address: str) -> None:
    """Refuse to listen where other machines could connect.

    Raises:
        UsageError: not an address of this machine alone.
    """
    scheme, _, rest = address.partition("://")
    if scheme in ("ipc", "inproc"):
        return
    host = rest.rpartition(":")[0].strip("[]")
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if scheme != "tcp" or not loopback:
        raise UsageError(
            f"transport.address {address} can be reached by other machines, which needs keys that this version does "
            "not have; use tcp://127.0.0.1:PORT, and an SSH tunnel for engines elsewhere"
        )


class ZmqLearnerSocket(SocketThread):
    """`LearnerSocket` over a ROUTER."""

    def __init__(
        self, address: str, *, max_message_bytes: int = 64 << 20, heartbeat_seconds: float = 1.0,
        tick_seconds: float = 0.25,
    ) -> None:  # fmt: skip
        super().__init__("learner-socket", tick_seconds)
        self.address = address
        self.sends_lost = 0
        self._options = _socket_options(address, max_message_bytes, heartbeat_seconds) | {zmq.ROUTER_MANDATORY: 1}
        self._lock = threading.Lock()
        self._backlogs: dict[bytes, deque[list[bytes]]] = {}
        self._disconnected: OrderedDict[bytes, None] = OrderedDict()
        self._flush_due = False

    def start(self, handler: LearnerHandler) -> None:
        self._handler = handler
        require_loopback(self.address)
        self.run_until_ready(self._main, handler.on_error)

    def send(self, peer: bytes, frames: Sequence[bytes]) -> None:
        with self._lock:
            backlog = self._backlogs.setdefault(peer, deque())
            backlog.append(list(frames))
            due, self._flush_due = self._flush_due, True
        if not due and not self.call(self._flush):
            self.sends_lost += 1

    def disconnect(self, peer: bytes) -> None:
        with self._lock:
            self._disconnected[peer] = None
            if len(self._disconnected) > _REMEMBERED_DISCONNECTS:
                self._disconnected.popitem(last=False)

    def stop(self, linger_seconds: float) -> None:
        self.stop_thread(linger_seconds)

    async def _main(self, ready: Future) -> None:
        context = zmq.asyncio.Context()
        self._socket = context.socket(zmq.ROUTER)
        _set_options(self._socket, self._options)
        try:
            self._bind()
            ready.set_result(None)
            await first_of(self.stopping.wait(), self._receive(), self.tick(self._handler.on_tick))
            await self._drain()
        finally:
            self._socket.close(linger=int(self.linger * 1000))
            context.term()

    def _bind(self) -> None:
        address = self.address.replace("tcp://localhost:", "tcp://127.0.0.1:")
        try:
            if address.startswith("ipc://") and _answers(address.removeprefix("ipc://")):
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

    async def _receive(self) -> None:
        received = 0
        while True:
            peer, *frames = await self._socket.recv_multipart()
            with self._lock:
                ignored = peer in self._disconnected
            if not ignored:
                self._handler.on_message(peer, frames)
            received += 1
            if received % _MESSAGES_A_TURN == 0:
                await asyncio.sleep(0)  # messages that are there already would keep ticks and sends waiting

    async def _drain(self) -> None:
        deadline = self.loop.time() + self.linger
        while self._backlogs and self.loop.time() < deadline:
            await asyncio.sleep(_RETRY_SECONDS)

    def _flush(self) -> None:
        """Send what each peer takes; a full peer is tried again later and holds up nobody."""
        gone = []
        with self._lock:
            self._flush_due = False
            for peer, backlog in list(self._backlogs.items()):
                if not self._send_backlog(peer, backlog):
                    gone.append(peer)
                    self.sends_lost += len(backlog)
                if peer in gone or not backlog:
                    del self._backlogs[peer]
            if self._backlogs and not self._flush_due:
                self._flush_due = True
                self.loop.call_later(_RETRY_SECONDS, self._flush)
        for peer in gone:
            self._handler.on_disconnect(peer)

    def _send_backlog(self, peer: bytes, backlog: deque[list[bytes]]) -> bool:
        """False when the peer is gone or hopelessly behind."""
        while backlog:
            # A send without waiting is done, or has failed, when the call returns.
            sent = cast(asyncio.Future, self._socket.send_multipart([peer, *backlog[0]], flags=zmq.DONTWAIT))
            error = sent.exception()
            if isinstance(error, zmq.Again):
                return len(backlog) <= _BACKLOG
            if isinstance(error, zmq.ZMQError):
                return False
            if error is not None:
                raise error
            backlog.popleft()
        return True


class ZmqEngineSocket(SocketThread):
    """`EngineSocket` over a DEALER."""

    def __init__(
        self, address: str, *, max_message_bytes: int = 64 << 20, heartbeat_seconds: float = 1.0,
        tick_seconds: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__("engine-socket", tick_seconds)
        self.address = address
        self.max_message_bytes = max_message_bytes
        # IMMEDIATE: nothing is queued for a learner that is not there; the spool is the queue.
        self._options = _socket_options(address, max_message_bytes, heartbeat_seconds) | {
            zmq.IMMEDIATE: 1, zmq.RECONNECT_IVL: 100, zmq.RECONNECT_IVL_MAX: 1000,
        }  # fmt: skip
        self._lock = threading.Lock()
        self._outbox: deque[list[bytes]] = deque()
        self._connected = False
        self._work = asyncio.Event()
        self._renew = asyncio.Event()

    def start(self, handler: EngineHandler) -> None:
        self._handler = handler
        self.run_until_ready(self._main, handler.on_error)

    def send(self, frames: Sequence[bytes]) -> bool:
        with self._lock:
            if not self._connected or len(self._outbox) >= _BACKLOG:
                return False
            self._outbox.append(list(frames))
        return self.call(self._work.set)

    def reconnect(self) -> None:
        self.call(self._renew.set)

    def stop(self, linger_seconds: float) -> None:
        self.stop_thread(linger_seconds)

    async def _main(self, ready: Future) -> None:
        context = zmq.asyncio.Context()
        try:
            self._connect(context)
            ready.set_result(None)
            await first_of(self.stopping.wait(), self._sessions(context), self.tick(self._handler.on_tick))
            await self._drain()
        finally:
            context.destroy(linger=int(self.linger * 1000))

    def _connect(self, context: zmq.asyncio.Context) -> None:
        self._socket = context.socket(zmq.DEALER)
        _set_options(self._socket, self._options)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        try:
            self._socket.connect(self.address)
        except zmq.ZMQError as error:
            raise UsageError(f"cannot connect to {self.address}: {error.strerror}; set transport.address") from error

    async def _sessions(self, context: zmq.asyncio.Context) -> None:
        """One socket after another, whenever a new connection is asked for."""
        while True:
            self._renew.clear()
            await first_of(self._renew.wait(), self._receive(), self._transmit(), self._watch())
            self._lose()
            self._socket.disable_monitor()
            self._socket.close(linger=0)
            self._connect(context)

    async def _receive(self) -> None:
        received = 0
        while True:
            self._handler.on_message(await self._socket.recv_multipart())
            received += 1
            if received % _MESSAGES_A_TURN == 0:
                await asyncio.sleep(0)

    async def _transmit(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            await self._send_outbox()

    async def _send_outbox(self) -> None:
        while self._outbox:
            frames = self._outbox[0]
            await self._socket.send_multipart(frames)
            with self._lock:
                if self._outbox and self._outbox[0] is frames:
                    self._outbox.popleft()

    async def _watch(self) -> None:
        while True:
            event = parse_monitor_message(await self._monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                with self._lock:
                    self._outbox.clear()
                    self._connected = True
                self._handler.on_connect()
            elif event == zmq.EVENT_DISCONNECTED:
                self._lose()

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._send_outbox(), self.linger)

    def _lose(self) -> None:
        with self._lock:
            was, self._connected = self._connected, False
            self._outbox.clear()
        if was:
            self._handler.on_disconnect()


def _socket_options(address: str, max_message_bytes: int, heartbeat_seconds: float) -> dict[int, int]:
    interval = max(1, int(heartbeat_seconds * 1000))
    return {
        zmq.IPV6: "[" in address, zmq.MAXMSGSIZE: max_message_bytes,
        zmq.SNDHWM: _HIGH_WATER_MARK, zmq.RCVHWM: _HIGH_WATER_MARK,
        zmq.HEARTBEAT_IVL: interval, zmq.HEARTBEAT_TIMEOUT: 5 * interval, zmq.HEARTBEAT_TTL: 5 * interval,
        zmq.LINGER: 0,
    }  # fmt: skip


def _set_options(socket: zmq.asyncio.Socket, options: dict[int, int]) -> None:
    for option, value in options.items():
        socket.setsockopt(option, value)


def _answers(path: str) -> bool:
    with stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == 0
