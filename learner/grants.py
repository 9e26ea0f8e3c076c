"""Leases on their way to engines: who gets how many, in messages that are not too large."""

import time
from collections.abc import Sequence

from learner.evaluation import Evaluation
from learner.journal import Granted, Journal
from learner.leases import Ledger, Source
from learner.roster import Roster
from pipeline import codec, messages
from pipeline.errors import RunFailed
from pipeline.failpoints import failpoint
from pipeline.messages import IDS_A_MESSAGE
from pipeline.transport.base import LearnerSocket


class Grants:
    """Not for several threads; the reception guards it."""

    def __init__(self, socket: LearnerSocket, journal: Journal, ledger: Ledger, source: Source, roster: Roster) -> None:
        self._socket, self._journal, self._ledger, self._source = socket, journal, ledger, source
        self._roster = roster

    def grant(self, evaluation: Evaluation | None, training: bool, lease_seconds: float) -> None:
        """Grant all that admission and credit allow, in one message an engine, so that they can start together.

        Args:
            evaluation: under way; its leases go first.
            training: whether leases for training are granted.
            lease_seconds: until a lease of the evaluation expires.

        Raises:
            RunFailed: a lease fits into no message.
        """
        grants: dict[bytes, list[messages.Lease]] = {}
        now = time.monotonic()
        if evaluation is not None:
            self._grant_evaluation(evaluation, grants, now + lease_seconds)
        while training and (engine := self._roster.freest(self._ledger.group_size)) is not None:
            lease = self._ledger.grant(engine.producer, self._source, now, self._journal.position)
            if lease is None:
                break
            failpoint("lease.granted")
            self._journal.append(Granted(lease.id, lease.epoch, lease.version, engine.producer))
            failpoint("lease.recorded")
            engine.unseen[lease.id] = lease.group_size
            grants.setdefault(engine.peer, []).append(lease)
        for peer, leases in grants.items():
            self._send(peer, leases)
            failpoint("lease.sent")

    def _grant_evaluation(
        self, evaluation: Evaluation, grants: dict[bytes, list[messages.Lease]], deadline: float
    ) -> None:
        while (engine := self._roster.freest(evaluation.group_size)) is not None:
            if (lease := evaluation.grant(engine.producer, deadline)) is None:
                break
            engine.unseen[lease.id] = lease.group_size
            grants.setdefault(engine.peer, []).append(lease)

    def _send(self, peer: bytes, leases: Sequence[messages.Lease]) -> None:
        """In one message where it fits, else in halves."""
        frames = codec.encode(messages.Grant(leases=tuple(leases)))
        if len(frames[0]) <= self._socket.max_message_bytes and len(leases) <= IDS_A_MESSAGE:
            self._socket.send(peer, frames)
        elif len(leases) > 1:
            self._send(peer, leases[: len(leases) // 2])
            self._send(peer, leases[len(leases) // 2 :])
        else:
            raise RunFailed(
                f"lease {leases[0].id} takes {len(frames[0])} bytes, more than transport.max_message_bytes = "
                f"{self._socket.max_message_bytes}; raise it, or shorten the prompt and its columns"
            )
