"""Process groups that exist for weights alone: the learner as rank 0, the processes of one engine as the others.

Not torch.distributed's default group, which a sharded learner has for itself, and one group an engine, so that an
engine that dies is nobody else's loss. Members find each other through a store in the learner's process. Neither the
store nor what is broadcast is encrypted or authenticated: that is so of gloo and NCCL.
"""

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import UsageError
from pipeline.messages import WeightsGroup
from pipeline.transport.options import check_address, is_local
from pipeline.weights.base import WeightsError

if TYPE_CHECKING:
    import torch

_LOOK_SECONDS = 0.0005
_STORE_SECONDS = 30.0


class TransferFailed(WeightsError):
    """Members of a group do not reach one another, or one has stopped answering; the group is of no use any more."""


def check_broadcasting(address: str, insecure: bool) -> None:
    """Refuse `weights.address` where nothing can listen, or where others could listen in.

    Raises:
        UsageError: one sentence with the remedy.
    """
    check_address(address, "weights.address")
    if not address.startswith("tcp://"):
        raise UsageError(f"weights.address {address!r} is not an address; write tcp://HOST:PORT")
    if not (is_local(address) or insecure):
        raise UsageError(
            f"weights.address {address} can be reached by other machines, and broadcasts know no keys; use --insecure "
            'on a network of your own, or weights.transfer = "files" with weights.transport = "stream"'
        )


class Meeting:
    """Learner side: the store. It listens on the one address alone."""

    def __init__(self, address: str) -> None:
        """
        Args:
            address: tcp://HOST:PORT; port 0: any.

        Raises:
            UsageError: it cannot be listened on.
        """
        from torch.distributed import TCPStore

        self.host, port = _parts(address)
        listening = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((self.host, port))
            listening.listen()
        except OSError as error:
            listening.close()
            raise UsageError(
                f"weights.address {address} cannot be listened on ({error.strerror or error}); give an address of this "
                "machine and a port that is free, or port 0"
            ) from error
        port = listening.getsockname()[1]
        shown = f"[{self.host}]" if ":" in self.host else self.host
        self.address = f"tcp://{shown}:{port}"
        """that members connect to"""
        self._port = port
        self._server = TCPStore(
            self.host, port, None, True, timedelta(seconds=_STORE_SECONDS), False, master_listen_fd=listening.detach()
        )

    def lead(self, message: WeightsGroup, device: "torch.device") -> "TransferGroup":
        """The group as rank 0, when all others have come.

        Raises:
            TransferFailed: they have not, in time.
        """
        # A connection of its own: on one that is shared, who waits for a member keeps all other groups waiting.
        store = _connected(self.host, self._port, message.seconds)
        return TransferGroup(store, message, 0, self.host, device)


def join(message: WeightsGroup, rank: int, device: "torch.device") -> "TransferGroup":
    """The group as a member that receives on `device`, or, over gloo, in the host's memory.

    Raises:
        TransferFailed: the learner's end is not reached, or the others have not come in time.
    """
    host, port = _parts(message.address)
    try:
        # tried first: torch writes pages about a connection that does not come about
        with socket.create_connection((host, port), timeout=message.seconds) as found:
            own = found.getsockname()[0]
        store = _connected(host, port, message.seconds)
    except (OSError, RuntimeError) as error:
        raise TransferFailed(
            f"the learner's weights.address {message.address} is not reached ({_why(error)}); name one there that this "
            "machine can connect to"
        ) from error
    return TransferGroup(store, message, rank, own, device)


class TransferGroup:
    """A member of a group; used by one thread at a time."""

    def __init__(self, store: Any, message: WeightsGroup, rank: int, host: str, device: "torch.device") -> None:
        """
        Args:
            store: of the meeting.
            rank: 0 sends.
            host: address of this machine that other members reach.
            device: of this member.

        Raises:
            TransferFailed: the others have not come in time.
        """
        import torch
        from torch.distributed import PrefixStore

        self.message, self._seconds = message, message.seconds
        self.device = device if message.backend == "nccl" else torch.device("cpu")
        """of what is broadcast"""
        make = _nccl if message.backend == "nccl" else _gloo
        try:
            self._group = make(PrefixStore(str(message.group), store), rank, message.size, host, message.seconds)
        except RuntimeError as error:
            raise TransferFailed(f"{message.size} processes did not come together ({_why(error)})") from error

    def broadcast(self, tensor: "torch.Tensor") -> None:
        """From rank 0 to all others, who give a tensor to be overwritten; contiguous, on `device`.

        Raises:
            TransferFailed: another member is gone, or did not take part in time.
        """
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        try:
            work = self._group.broadcast([tensor], options)
            work.wait()  # of gloo until it is over: a group that is let go of with work under way would block us
            if self.device.type == "cuda":
                self._wait_for_device()
        except RuntimeError as error:
            raise TransferFailed(_why(error)) from error

    def _wait_for_device(self) -> None:
        """NCCL's kernel waits for a lost member for ever, so nobody waits for it without looking at the time."""
        import torch

        done = torch.cuda.Event()
        with torch.cuda.device(self.device):
            done.record()
        deadline = time.monotonic() + self._seconds
        while not done.query():
            if time.monotonic() > deadline:
                self.close()
                raise TransferFailed(f"another member did not take part within {self._seconds:g} s")
            time.sleep(_LOOK_SECONDS)

    def close(self) -> None:
        """Whoever waits for this member hears of it."""
        group, self._group = self._group, None
        if group is not None and self.message.backend == "nccl":
            group.abort()


def device_name(device: "torch.device") -> str:
    """For `WeightsJoin`: the device of a member, told apart from all others if NCCL can be used with it."""
    import torch
    from torch import distributed

    if device.type != "cuda" or not distributed.is_nccl_available():
        return "cpu"
    index = torch.cuda.current_device() if device.index is None else device.index
    return f"cuda {torch.cuda.get_device_properties(index).uuid}"


def backend_for(devices: tuple[str, ...]) -> Literal["gloo", "nccl"]:
    """Of a group with members on these devices, as `device_name` calls them: NCCL wants a GPU for each of them."""
    alone = len(set(devices)) == len(devices) and all(name.startswith("cuda") for name in devices)
    return "nccl" if alone else "gloo"


def _connected(host: str, port: int, seconds: float) -> Any:
    from torch.distributed import TCPStore

    return TCPStore(host, port, None, False, timedelta(seconds=seconds), False)


def _gloo(store: Any, rank: int, size: int, host: str, seconds: float) -> Any:
    from torch import distributed

    kind: Any = distributed.ProcessGroupGloo
    options = kind._Options()
    options._devices = [kind.create_device(hostname=host)]  # else it listens on what this machine's name means
    options._timeout = timedelta(seconds=seconds)
    return kind(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int, host: str, seconds: float) -> Any:
    from torch import distributed

    kind: Any = distributed.ProcessGroupNCCL
    options = kind.Options()
    options._timeout = timedelta(seconds=10 * seconds + 60)  # we give up first, and say so
    # By default its watchdog ends the whole process, the learner's, when a member is gone.
    with _environment("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"):
        return kind(store, rank, size, options)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), 0 if port == "*" else int(port)


def _why(error: BaseException) -> str:
    """What torch says, without where in its source it says so, and what it advises."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = re.sub(r"^\[\S+\]\s*", "", str(error).strip().partition("\n")[0])
    return text.partition(". ")[0][:200]
