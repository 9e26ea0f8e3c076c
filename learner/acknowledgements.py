"""The two answers to a sample: Received when the ledger has it, Committed when the journal has synced it."""

import threading
from collections.abc import Callable, Iterable
from functools import partial

from learner.journal import Arrived, Failed, Journal
from learner.lease_state import Outcome
from learner.roster import Engine, Roster
from pipeline.failpoints import failpoint
from pipeline.messages import IDS_A_MESSAGE, Committed, LearnerMessage, Received, SampleId


class Acknowledgements:
    """Called under the hub's lock, but for the journal's callbacks, which take it."""

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
        self.unjournaled_bytes = 0
        """of those samples"""

    def give(self, engine: Engine, sample: SampleId, outcome: Outcome, record: Arrived | Failed) -> None:
        """Answer a sample that the ledger has judged; one it does not want is committed at once."""
        self._send(engine.peer, Received(samples=(sample,)))
        if outcome is Outcome.ACCEPTED:
            size = sum(map(len, record.frames)) if isinstance(record, Arrived) else 0
            self._awaiting[sample] = {engine.producer}
            engine.unjournaled_bytes += size
            self.unjournaled_bytes += size
            self._journal.append(record, partial(self._durable, sample, engine, size))
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
        for begin in range(0, len(durable), IDS_A_MESSAGE):
            self._send(engine.peer, Committed(samples=tuple(durable[begin : begin + IDS_A_MESSAGE])))

    def _durable(self, sample: SampleId, engine: Engine, size: int) -> None:
        with self._lock:
            engine.unjournaled_bytes -= size
            self.unjournaled_bytes -= size
            for producer in self._awaiting.pop(sample, ()):
                if (peer := self._roster.peer_of(producer)) is not None:
                    self._send(peer, Committed(samples=(sample,)))
        failpoint("ack.sent")
