"""What the learner's hub and the engine's link need of a transport.

A socket runs in one thread of its own and calls its handler there; `send` may be called from any thread and never
blocks. Nothing here promises delivery: what must arrive is kept in a spool or a journal and sent again after HELLO.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol


class LearnerHandler(Protocol):
    """Called in the socket's thread; must not block."""

    def on_message(self, peer: bytes, frames: list[bytes]) -> None: ...

    def on_disconnect(self, peer: bytes) -> None:
        """A send found the peer gone, or too slow to take its messages. Silence is for the handler to notice."""

    def on_tick(self) -> None:
        """Several times a second."""

    def on_refused(self, reason: str) -> None:
        """A connection did not come about: its key is not known, say."""

    def on_error(self, error: Exception) -> None:
        """The socket's thread ended by this error; nothing will be sent or received any more."""


class LearnerSocket(Protocol):
    """The side that listens. A peer is named by bytes that the transport assigns, new on every connection."""

    address: str
    """where engines connect; the bound endpoint after `start`"""
    max_message_bytes: int
    """a larger frame ends its sender's connection"""
    sends_lost: int
    """messages to peers that had gone"""
    damaged: int
    """messages that were not what their sender's checksum says; their connections were ended"""
    refused: Counter[str]
    """connections that did not come about, by reason"""

    def start(self, handler: LearnerHandler) -> None:
        """Listen.

        Raises:
            UsageError: the address cannot be listened on.
        """

    def send(self, peer: bytes, frames: Sequence[bytes]) -> None:
        """Queue a message; one that cannot be delivered is counted in `sends_lost`."""

    def waiting(self, peer: bytes) -> int:
        """Bytes queued for a peer that it does not take at the moment."""

    def disconnect(self, peer: bytes) -> None:
        """Ignore what the peer still sends; what is queued for it goes out."""

    def key_of(self, peer: bytes) -> str:
        """Fingerprint of the key that the peer proved to have; empty without encryption."""

    def stop(self, linger_seconds: float) -> None:
        """Send what is queued for at most this long, then close."""


class EngineHandler(Protocol):
    """Called in the socket's thread; must not block."""

    def on_connect(self) -> None:
        """Connected, for the first time or again; whatever was queued before is gone."""

    def on_message(self, frames: list[bytes]) -> None: ...

    def on_disconnect(self) -> None: ...

    def on_tick(self) -> None:
        """Several times a second, connected or not."""

    def on_refused(self) -> None:
        """The learner knows our key and does not list it."""

    def on_error(self, error: Exception) -> None:
        """The socket's thread ended by this error."""


class EngineSocket(Protocol):
    """The side that connects, and keeps trying to."""

    address: str
    max_message_bytes: int
    """a larger frame would end the connection, again and again"""
    damaged: int
    """messages damaged on the way, theirs or ours; the connection was renewed each time"""
    handshakes_failed: int
    """connections that ended before a word was said: wrong keys, or keys on one side only"""

    def start(self, handler: EngineHandler) -> None: ...

    def send(self, frames: Sequence[bytes]) -> bool:
        """Queue a message; False when there is no connection or no room, and the message was not taken."""

    def reconnect(self) -> None:
        """Leave the connection there is, drop what is queued, connect anew."""

    def stop(self, linger_seconds: float) -> None:
        """Send what is queued for at most this long, then close."""
