"""The answer to a sample: Committed, when the journal has synced it or it is not wanted."""

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial

from learner.journal import Arrived, Failed, Journal
from learner.lease_state import Outcome
from learner.roster import Engine, Roster
from pipeline.failpoints import failpoint
from pipeline.messages import IDS_A_MESSAGE, Committed, LearnerMessage, SampleId


class Acknowledgements:
    """Called under the hub's lock, but for the journal's callbacks, which take it once for all that was synced."""

    def __init__(
        self,
        lock: threading.Condition,
        roster: Roster,
        journal: Journal,
        send: Callable[[bytes, LearnerMessage], None],
    ) -> None:
        self._lock, self._roster, self._journal, self._send = lock, roster, journal, send
        self._awaiting: dict[SampleId, set[str]] = {}
        """samples the journal has not synced yet -> producers that wait for it"""
        self._synced: list[tuple[SampleId, str, int]] = []
        """by the journal's thread alone"""
        self._unjournaled: Counter[str] = Counter()
        """producer -> bytes of its samples that are not synced, on whatever connection they came"""
        journal.after_sync = self._commit_synced

    @property
    def unjournaled_bytes(self) -> int:
        """Of samples that are not synced."""
        return self._unjournaled.total()

    def unjournaled_of(self, producer: str) -> int:
        """Bytes of a producer's samples that are not synced."""
        return self._unjournaled[producer]

    def give(self, engine: Engine, sample: SampleId, outcome: Outcome, record: Arrived | Failed) -> None:
        """Answer a sample that the ledger has judged; one it does not want is committed at once."""
        if outcome is Outcome.ACCEPTED:
            size = sum(map(len, record.frames)) if isinstance(record, Arrived) else len(record.detail.encode())
            self._awaiting[sample] = {engine.producer}
            self._unjournaled[engine.producer] += size
            self._journal.append(record, partial(self._synced.append, (sample, engine.producer, size)))
        else:
            self.repeat(engine, [sample])

    def repeat(self, engine: Engine, samples: Iterable[SampleId]) -> None:
        """An engine has samples in its spool that were received before, from it or from another."""
        durable = []
        for sample in samples:
            if sample in self._awaiting:
                self._awaiting[sample].add(engine.producer)
            else:
                durable.append(sample)
        self._commit(engine.peer, durable)

    def _commit_synced(self) -> None:
        """Tell each engine which of its samples are safe now."""
        with self._lock:
            safe: dict[bytes, list[SampleId]] = defaultdict(list)
            for sample, sender, size in self._synced:
                self._unjournaled[sender] -= size
                if not self._unjournaled[sender]:
                    del self._unjournaled[sender]
                for producer in self._awaiting.pop(sample, ()):
                    if (peer := self._roster.peer_of(producer)) is not None:
                        safe[peer].append(sample)
            self._synced.clear()
            for peer, samples in safe.items():
                self._commit(peer, samples)
                failpoint("ack.sent")

    def _commit(self, peer: bytes, samples: list[SampleId]) -> None:
        for begin in range(0, len(samples), IDS_A_MESSAGE):
            self._send(peer, Committed(samples=tuple(samples[begin : begin + IDS_A_MESSAGE])))
