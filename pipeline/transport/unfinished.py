"""Cuts connections whose peer begins a message and never ends it.

ZeroMQ limits the bytes of a frame and the number of messages that wait, but not the frames of one message, which it
collects before a program sees the first. So the bytes that the kernel has received on each connection are held against
the messages that have come from it. Linux alone tells those bytes, and of TCP alone; elsewhere nothing is cut.
"""

import os
import socket as stdlib_socket
import sys
from dataclasses import dataclass
from struct import Struct

_RECEIVED = Struct("<Q")
_RECEIVED_AT = 128
"""where tcpi_bytes_received lies in Linux's struct tcp_info (linux/tcp.h)"""
_STRIKES = 3
"""looks that an unfinished message must be too long for: messages may lie ready while Python was busy"""
_SLACK = 1 << 20
"""bytes of frame headers, heartbeats and encryption"""


@dataclass(slots=True)
class _Connection:
    received: int = 0
    """bytes up to the last look before which a whole message had come"""
    whole: int = 0
    """messages that came since"""
    known: bool = False
    """at least one ever came"""
    strikes: int = 0
    peer: bytes = b""
    """its routing id, once it is known"""


class UnfinishedMessages:
    """By the file descriptors of connections, as ZeroMQ names them; for one thread."""

    def __init__(self, port: int, first_bytes: int, bytes_: int) -> None:
        """
        Args:
            port: that is listened on; 0: nothing is cut.
            first_bytes: that the first message of a connection may have.
            bytes_: that any other may have, all its frames together.
        """
        self._port = port if sys.platform == "linux" else 0
        self._first_bytes, self._bytes = first_bytes, bytes_
        self._connections: dict[int, _Connection] = {}

    def accepted(self, descriptor: int) -> None:
        """A connection was opened."""
        self._connections[descriptor] = _Connection()

    def delivered(self, descriptor: int, peer: bytes) -> None:
        """A whole message came."""
        if (connection := self._connections.get(descriptor)) is not None:
            connection.whole += 1
            connection.peer = peer

    def end(self, peer: bytes) -> None:
        """End a peer's connection."""
        for descriptor, connection in list(self._connections.items()):
            if self._port and connection.peer == peer:
                self._end(descriptor)
                del self._connections[descriptor]

    def cut(self) -> int:
        """Look at every connection; returns how many were ended."""
        ended = 0
        for descriptor, connection in list(self._connections.items()) if self._port else ():
            if (received := self._received(descriptor)) is None:
                del self._connections[descriptor]
            elif self._is_endless(connection, received):
                self._end(descriptor)
                del self._connections[descriptor]
                ended += 1
        return ended

    def _is_endless(self, connection: _Connection, received: int) -> bool:
        if connection.whole:
            connection.received, connection.whole, connection.known, connection.strikes = received, 0, True, 0
        allowed = (self._bytes if connection.known else self._first_bytes) + _SLACK
        connection.strikes = connection.strikes + 1 if received - connection.received > allowed else 0
        return connection.strikes >= _STRIKES

    def _received(self, descriptor: int) -> int | None:
        """Bytes that came on a connection; None when it is none of ours any more."""
        try:
            with _borrowed(descriptor) as connection:
                if connection.getsockname()[1] != self._port:
                    return None
                info = connection.getsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_INFO, 256)
        except OSError:  # closed, or no TCP
            return None
        if len(info) < _RECEIVED_AT + _RECEIVED.size:  # a kernel before 4.1
            return None
        received: int = _RECEIVED.unpack_from(info, _RECEIVED_AT)[0]
        return received

    def _end(self, descriptor: int) -> None:
        """ZeroMQ finds the connection at its end, and forgets what had come."""
        try:
            with _borrowed(descriptor) as connection:
                if connection.getsockname()[1] == self._port:
                    connection.shutdown(stdlib_socket.SHUT_RDWR)
        except OSError:  # closed meanwhile
            pass


def _borrowed(descriptor: int) -> stdlib_socket.socket:
    """A socket of our own on a connection that ZeroMQ owns: closing it leaves that one open."""
    return stdlib_socket.socket(fileno=os.dup(descriptor))
