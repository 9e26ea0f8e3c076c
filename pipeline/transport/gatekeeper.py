"""Decides which keys may connect: pyzmq's ZAP authenticator with our allow-list behind it.

pyzmq's is used because it implements the ZAP protocol (RFC 27) and nothing that matters here is missing from it: its
callback lets the list be read anew and refusals be counted and told.
"""

from collections.abc import Callable

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from pipeline.transport.keys import LearnerKeys, fingerprint

_DOMAIN = "rollahead"


class Gatekeeper:
    """For one socket of a context; used in its event loop's thread."""

    def __init__(self, context: zmq.Context, keys: LearnerKeys, on_refused: Callable[[str], None]) -> None:
        self._keys, self._on_refused = keys, on_refused
        self._authenticator = AsyncioAuthenticator(zmq.asyncio.Context(shadow=context))
        self._problem_told = ""

    def guard(self, socket: zmq.Socket) -> None:
        """Make a socket that is not bound yet a CURVE server."""
        self._authenticator.start()
        self._authenticator.configure_curve_callback(_DOMAIN, self)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN.encode())

    def callback(self, domain: str, key: bytes) -> bool:
        """As the authenticator calls it: whether a key (Z85) may connect."""
        allowed = self._keys.allowed.name(key) is not None
        problem = self._keys.allowed.problem
        if problem and problem != self._problem_told:
            self._on_refused(f"no engine is let in: {problem}")
        self._problem_told = problem
        if not allowed and not problem:
            self._on_refused(
                f"an engine's key is not on the list {self._keys.allowed.path} (fingerprint {fingerprint(key)}, "
                f"key {key.decode(errors='replace')})"
            )
        return allowed

    def stop(self) -> None:
        self._authenticator.stop()
