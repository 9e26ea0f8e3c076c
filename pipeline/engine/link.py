"""The engine's side of the wire: leases in, samples out, and the same engine still when the learner restarts.

The main loop polls events, submits samples and says how it stands; the session talks to the learner in the socket's
thread. Whenever a connection comes up it says HELLO; after WELCOME the outbox sends what is spooled and not received.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from msgspec import structs

from pipeline import messages
from pipeline.codec import encode, encode_trajectory
from pipeline.engine.link_events import Drained, Event, Failed, Granted, Revoked, VersionHint
from pipeline.engine.outbox import Outbox
from pipeline.engine.session import Session
from pipeline.messages import Capabilities, SampleId, Trajectory
from pipeline.transport.base import EngineSocket
from pipeline.transport.spool import Spool

__all__ = ["Drained", "Event", "Failed", "Granted", "Link", "LinkStats", "Revoked", "VersionHint"]

_LINGER_SECONDS = 2.0


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
    """Owns its socket and spool. `update`, `submit` and `poll` are for one thread, the rest may be called from any."""

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
        on_weights: Callable[[messages.WeightsAnswer], None] = lambda message: None,
    ) -> None:
        """
        Args:
            socket: not started.
            digest: what engine and learner must agree on.
            heartbeat_seconds: between progress messages; the learner is lost after five without a word.
            connect_timeout: seconds to wait for the learner, at first and whenever it is lost; 0: for ever.
            on_event: gets a line about the connection; from any thread.
            on_weights: gets the answers to `ask_for_weights`; from the socket's thread, must not block.
        """
        self._socket, self._spool, self._on_event = socket, spool, on_event
        self._outbox = Outbox(socket, spool, self._spool_failed, on_event)
        self._session = Session(
            socket, spool, self._outbox, digest=digest, capabilities=capabilities,
            heartbeat_seconds=heartbeat_seconds, connect_timeout=connect_timeout, on_event=on_event,
            on_weights=on_weights,
        )  # fmt: skip
        self._sequence = 0
        self.cpu_seconds = 0.0
        """of the main loop, in `poll`, `update` and `submit`"""

    @property
    def run(self) -> str:
        """Identity of the learner's run; empty before the first WELCOME."""
        return self._session.run

    @property
    def broadcasts(self) -> bool | None:
        """Whether the learner broadcasts weights to engines that ask for a group; None while it is away."""
        return self._session.broadcasts if self._session.welcomed else None

    @property
    def connections(self) -> int:
        """To the learner so far; what was asked on an earlier one is not answered."""
        return self._session.connections

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
        self._session.begin_waiting()
        self._outbox.start()
        self._socket.start(self._session)

    def poll(self, timeout: float) -> list[Event]:
        """Events so far; waits at most `timeout` seconds for the first."""
        if not (timeout or self._session.has_events):
            return []
        with self._counted():
            return self._session.events(timeout)

    def update(
        self,
        running: Collection[int],
        credit: int,
        version: int,
        generated_tokens: int,
        busy_seconds: float,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        """How the engine stands; cheap, to be called every step.

        Args:
            running: leases it works on, up to the call of `submit` for their samples.
            credit: samples it could start now, beyond those leases; the learner hears of none while the spool is full.
            version: publication loaded, -1 before the first.
            generated_tokens: since the engine's start.
            busy_seconds: that the generator ran since the engine's start.
            seconds: by what the engine did since its start.
        """
        with self._counted():
            self._session.update(running, credit, version, generated_tokens, busy_seconds, seconds)

    def submit(self, *trajectories: Trajectory) -> None:
        """Send samples, which are written to disk together; producer, incarnation and sequence of their headers are
        filled in. Does not wait: while the spool is full they are kept in memory, and `update` lets nothing new be
        leased.

        A sample that is too large to be sent is dropped as `too_large`, and named in a line.
        """
        with self._counted():
            self._outbox.put(*(self._message_of(trajectory) for trajectory in trajectories))

    def _message_of(self, trajectory: Trajectory) -> tuple[SampleId, Sequence[bytes]]:
        header = structs.replace(
            trajectory.header, producer=self._spool.producer, incarnation=self._spool.incarnation,
            sequence=self._sequence,
        )  # fmt: skip
        self._sequence += 1
        frames = encode_trajectory(structs.replace(trajectory, header=header))
        if why := self._too_large(frames):
            self._on_event(f"sample {trajectory.id} is dropped: {why}")
            return trajectory.id, _failure_of(trajectory.id, "too_large", why)
        return trajectory.id, frames

    def fail_sample(self, lease: int, sample: int, reason: str, detail: str) -> None:
        """A sample will not come; the learner counts it as dropped for `reason`."""
        self._outbox.put(((lease, sample), _failure_of((lease, sample), reason, detail)))

    def leave(self, handed_back: Collection[int]) -> None:
        """No more leases; those named go back. The learner is told once everything submitted is safe with it, or at
        `stop`."""
        self._session.leave(handed_back)

    def flush(self, timeout: float) -> bool:
        """Wait until everything submitted is committed; False after `timeout` seconds, or when the learner is away."""
        return self._outbox.wait_until_empty(timeout)

    def fatal(self, message: str, traceback: str = "") -> None:
        """Tell the learner that the engine ends by an error; `stop` gives the message its time to arrive."""
        self._socket.send(encode(messages.fatal(message, traceback)))
        self._session.stay()

    def stop(self) -> None:
        """Say that we leave, if `leave` was called, and close; what is not committed stays in the spool."""
        self._outbox.stop()
        self._session.end()
        self._socket.stop(_LINGER_SECONDS)
        self._spool.close()

    def stats(self) -> LinkStats:
        outbox = self._outbox.stats()
        return LinkStats(
            self._session.welcomed, outbox.queued, outbox.spooled, outbox.spooled_bytes, outbox.sent_bytes,
            outbox.blocked_seconds, self._socket.damaged, self._spool.corrupt,
        )  # fmt: skip

    def ask_for_weights(self, message: messages.WeightsQuestion) -> bool:
        """Ask the learner for a publication; False when it is not connected now."""
        return self._session.send(message)

    def _too_large(self, frames: list[bytes]) -> str:
        """Why the learner would refuse to look at a sample; empty when it would not."""
        if len(frames[0]) > messages.LARGEST_HEADER:
            return f"its header takes {len(frames[0])} bytes, more than {messages.LARGEST_HEADER}"
        if (largest := max(map(len, frames))) > self._socket.max_message_bytes:
            return (
                f"it takes {largest} bytes, more than transport.max_message_bytes = {self._socket.max_message_bytes}; "
                "raise it, on both sides"
            )
        return ""

    @contextmanager
    def _counted(self) -> Iterator[None]:
        began = time.thread_time()
        try:
            yield
        finally:
            self.cpu_seconds += time.thread_time() - began

    def _spool_failed(self, reason: str) -> None:
        self.fatal(reason)
        self._session.fail(reason, refused=False)


def _failure_of(sample: SampleId, reason: str, detail: str) -> list[bytes]:
    return encode(
        messages.SampleFailed(
            lease=sample[0], sample=sample[1], reason=reason, detail=detail[: messages.LONGEST_DETAIL]
        )
    )
