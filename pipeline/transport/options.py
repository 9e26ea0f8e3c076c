"""Socket options both sides share, and where a learner may listen."""

import ipaddress
import socket as stdlib_socket
from collections.abc import Callable

import zmq

from pipeline.errors import UsageError

HIGH_WATER_MARK = 64
BACKLOG = 4096
"""messages queued for one peer beyond what ZeroMQ takes; a peer that lets so many wait is given up"""
BACKLOG_BYTES = 32 << 20
"""of those, beyond one message of the largest size"""
RETRY_SECONDS = 0.02
MESSAGES_A_TURN = 32


def check_listening(address: str, encrypted: bool, insecure: bool, warn: Callable[[str], None]) -> None:
    """Refuse to listen where other machines could connect without keys.

    Args:
        insecure: listen there all the same, after a line through `warn`.

    Raises:
        UsageError: it can be reached by others, and there are no keys.
    """
    if encrypted or is_local(address):
        return
    if not insecure:
        raise UsageError(
            f"transport.address {address} can be reached by other machines, which needs keys: make them with "
            "`rollahead keygen DIR` and set transport.keys=DIR; or use tcp://127.0.0.1:PORT and an SSH tunnel, or "
            "--insecure on a network where everybody may write to this run"
        )
    warn(f"WARNING: listening on {address} without keys: whoever reaches it can read and write this run's samples")


def check_address(address: str, option: str) -> None:
    """Raises UsageError, naming the option, for what no socket could listen on or connect to."""
    scheme, mark, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    local = scheme in ("ipc", "inproc") and rest
    numbered = port == "*" or (port.isdecimal() and int(port) < 1 << 16)
    if not (local or (scheme == "tcp" and mark and host and numbered)):
        raise UsageError(f"{option} {address!r} is not an address; write tcp://HOST:PORT")


def is_local(address: str) -> bool:
    """Whether only this machine reaches the address."""
    scheme, _, rest = address.partition("://")
    if scheme in ("ipc", "inproc"):
        return True
    host = rest.rpartition(":")[0].strip("[]")
    try:
        return scheme == "tcp" and (host == "localhost" or ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return False


def common_options(address: str, max_message_bytes: int, heartbeat_seconds: float) -> dict[int, int]:
    """Heartbeats, limits and queues; nothing is kept for a peer after `close`."""
    interval = max(1, int(heartbeat_seconds * 1000))
    return {
        zmq.IPV6: "[" in address, zmq.MAXMSGSIZE: max_message_bytes,
        zmq.SNDHWM: HIGH_WATER_MARK, zmq.RCVHWM: HIGH_WATER_MARK,
        zmq.HEARTBEAT_IVL: interval, zmq.HEARTBEAT_TIMEOUT: 5 * interval, zmq.HEARTBEAT_TTL: 5 * interval,
        zmq.LINGER: 0,
    }  # fmt: skip


def set_options(socket: zmq.Socket, options: dict[int, int]) -> None:
    for option, value in options.items():
        socket.setsockopt(option, value)


def answers(path: str) -> bool:
    """Whether somebody listens on an ipc path."""
    with stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == 0
