"""The engines that are connected to the learner: who is who, what each can take, what all have done so far."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pipeline.messages import Progress

_PRODUCERS = 4096
"""remembered beyond those that are connected; engines that restart with new spools must not fill the memory"""
_STATES = 32
"""names of states that seconds are counted under; others, which no engine of ours has, are left out"""


def short_name(producer: str) -> str:
    """Enough of a producer's id to tell engines apart."""
    return producer[:8]


@dataclass(slots=True)
class Engine:
    """One connected engine process."""

    peer: bytes
    producer: str
    incarnation: int
    heard: float
    """time of its last message"""
    credit: int = 0
    """samples it said it could start"""
    unseen: dict[int, int] = field(default_factory=dict)
    """leases granted that no progress message listed yet -> their samples; the credit does not know of them"""
    draining: bool = False
    """told, or has said, that it gets nothing new"""
    idle: bool = True
    """listed no lease in its last progress message"""
    spooled_bytes: int = 0
    blocked_seconds: float = 0.0
    spool_damaged: int = 0
    instance: int = 0
    """drawn by its process"""
    advanced: float = 0.0
    """time of the last message that said it had generated something, or had nothing to do"""
    stalled: bool = False
    """it has work and does not advance"""

    @property
    def free(self) -> int:
        """Samples that can be granted to it now."""
        return 0 if self.draining else max(0, self.credit - sum(self.unseen.values()))

    def takes(self, samples: int) -> bool:
        """Whether it has room for a group; an idle engine takes one that is larger than all of its room."""
        return self.free >= samples or (self.free > 0 and self.idle and not self.unseen)


@dataclass(slots=True)
class _Counters:
    """Of one incarnation, from its first progress message on, so that a learner's restart counts nothing twice."""

    first_tokens: int
    first_seconds: float
    tokens: int
    seconds: float
    first_states: dict[str, float]
    states: dict[str, float]


class Roster:
    """Not for several threads; the hub guards it."""

    def __init__(self) -> None:
        self._engines: dict[bytes, Engine] = {}
        self._incarnations: dict[str, int] = {}
        self._counters: dict[tuple[str, int], _Counters] = {}
        self._past = _Counters(0, 0.0, 0, 0.0, {}, {})
        """sum of counters that are not kept one by one any more"""
        self._expected: set[str] = set()
        """producers that said HELLO and did not leave in order"""
        self._failures: dict[str, str] = {}
        """producers that ended by an error -> the error"""

    def __len__(self) -> int:
        return len(self._engines)

    def __iter__(self) -> Iterator[Engine]:
        return iter(list(self._engines.values()))

    def get(self, peer: bytes) -> Engine | None:
        return self._engines.get(peer)

    def peer_of(self, producer: str) -> bytes | None:
        return next((engine.peer for engine in self._engines.values() if engine.producer == producer), None)

    def newest_incarnation(self, producer: str) -> int:
        """Highest incarnation that ever said HELLO; -1 for an unknown producer."""
        return self._incarnations.get(producer, -1)

    def add(self, engine: Engine) -> Engine | None:
        """An engine said HELLO; returns the one of the same producer on another connection that it replaces."""
        before = self.peer_of(engine.producer)
        replaced = self._engines.pop(before) if before is not None else None
        self._engines[engine.peer] = engine
        self._incarnations.pop(engine.producer, None)  # so that the order is that of the last HELLO
        self._incarnations[engine.producer] = engine.incarnation
        self._expected.add(engine.producer)
        self._failures.pop(engine.producer, None)
        self._forget_oldest()
        return replaced if replaced is not None and replaced.peer != engine.peer else None

    def remove(self, peer: bytes) -> Engine | None:
        """An engine is not connected any more; it may come back."""
        return self._engines.pop(peer, None)

    def left(self, engine: Engine) -> None:
        """An engine left in order."""
        self.remove(engine.peer)
        self._expected.discard(engine.producer)

    def failed(self, engine: Engine, error: str) -> None:
        """An engine ended by an error."""
        self.remove(engine.peer)
        self._failures[engine.producer] = error

    def all_failed(self) -> list[str]:
        """The errors, when every engine that did not leave in order ended by one; else nothing."""
        if self._engines or not self._expected <= self._failures.keys():
            return []
        return [f"{short_name(producer)} {error}" for producer, error in self._failures.items()]

    def progress(self, engine: Engine, message: Progress) -> None:
        known = self._counters.get((engine.producer, engine.incarnation))
        before = (known.tokens + known.first_tokens, known.seconds + known.first_seconds) if known else None
        if not message.running or before != (message.generated_tokens, message.busy_seconds):
            engine.advanced = engine.heard
        engine.blocked_seconds, engine.spool_damaged = message.blocked_seconds, message.spool_damaged
        engine.credit = message.credit
        engine.idle = not message.running
        engine.spooled_bytes = message.spooled_bytes
        for lease in message.running:
            engine.unseen.pop(lease, None)
        counters = self._counters.setdefault(
            (engine.producer, engine.incarnation),
            _Counters(message.generated_tokens, message.busy_seconds, 0, 0.0, dict(message.seconds), {}),
        )
        counters.tokens = message.generated_tokens - counters.first_tokens
        counters.seconds = message.busy_seconds - counters.first_seconds
        counters.states = {
            state: seconds - counters.first_states.get(state, 0.0) for state, seconds in message.seconds.items()
        }

    def _forget_oldest(self) -> None:
        """Of producers and counters there are at most so many; totals keep what the counters said."""
        connected = {engine.producer for engine in self._engines.values()}
        while len(self._incarnations) > _PRODUCERS + len(connected):
            producer = next(name for name in self._incarnations if name not in connected)
            del self._incarnations[producer]
            self._expected.discard(producer)
            self._failures.pop(producer, None)
        while len(self._counters) > _PRODUCERS + len(connected):
            key = next(key for key in self._counters if key[0] not in connected or key[1] != self._incarnations[key[0]])
            counters = self._counters.pop(key)
            self._past.tokens += counters.tokens
            self._past.seconds += counters.seconds
            _add(self._past.states, counters.states)

    def freest(self, samples: int) -> Engine | None:
        """The engine with most credit of those that take a group of so many samples."""
        takers = (engine for engine in self._engines.values() if engine.takes(samples))
        return max(takers, key=lambda engine: engine.free, default=None)

    def silent(self, before: float) -> list[Engine]:
        """Engines not heard of since a time."""
        return [engine for engine in self._engines.values() if engine.heard < before]

    def forget_unseen(self, leases: Iterable[int]) -> None:
        """Grants that an engine never confirmed and that have expired take no credit any more."""
        for lease in leases:
            for engine in self._engines.values():
                engine.unseen.pop(lease, None)

    @property
    def blocked_seconds(self) -> float:
        return sum(engine.blocked_seconds for engine in self._engines.values())

    @property
    def spool_damaged(self) -> int:
        return sum(engine.spool_damaged for engine in self._engines.values())

    @property
    def generated_tokens(self) -> int:
        return self._past.tokens + sum(counters.tokens for counters in self._counters.values())

    @property
    def busy_seconds(self) -> float:
        return self._past.seconds + sum(counters.seconds for counters in self._counters.values())

    @property
    def seconds(self) -> dict[str, float]:
        """By what engines did, summed over engines."""
        total = dict(self._past.states)
        for counters in self._counters.values():
            _add(total, counters.states)
        return total

    @property
    def credit(self) -> int:
        return sum(engine.free for engine in self._engines.values())

    @property
    def spooled_bytes(self) -> int:
        return sum(engine.spooled_bytes for engine in self._engines.values())


def _add(total: dict[str, float], states: dict[str, float]) -> None:
    for state, seconds in states.items():
        if state in total or len(total) < _STATES:
            total[state] = total.get(state, 0.0) + seconds
