"""What was emitted, kept for drafters that are not asked for a while: they are told many steps together."""

from collections.abc import Collection, Sequence
from itertools import chain

import msgspec
import numpy as np
import torch

from drafters.base import Needs, Verified, locked

WAITS = ~Needs.LAYER_STATES
"""what a drafter may need whose observations can wait; of layer states a step's are many times its hidden states"""
MOST_BYTES = 32 << 20
"""of hidden states that wait"""


class Backlog:
    """Steps that some of its readers have not been told of yet."""

    def __init__(self, readers: int) -> None:
        self._steps: list[Verified] = []
        self._read = [0] * readers
        """of those steps, what each reader has been told"""
        self._bytes = 0

    @property
    def full(self) -> bool:
        return self._bytes > MOST_BYTES

    def add(self, verified: Verified, told: Collection[int] = ()) -> None:
        """A step, and who has been told of it, and of all before it; its logits and layer states are not kept."""
        if verified.logits is not None or verified.layers is not None:
            verified = msgspec.structs.replace(verified, logits=None, layers=None)
        self._steps.append(verified)
        if verified.hidden is not None:
            self._bytes += verified.hidden.nbytes
        for reader in told:
            self._read[reader] = len(self._steps)
        self._forget()

    def waiting(self, reader: int) -> int:
        """Steps that are new to a reader."""
        return len(self._steps) - self._read[reader]

    def take(self, reader: int) -> list[Verified]:
        """All that is new to a reader, in order."""
        if not self.waiting(reader):
            return []
        found = self._steps[self._read[reader] :]
        self._read[reader] = len(self._steps)
        self._forget()
        return found

    def _forget(self) -> None:
        """What all readers have been told."""
        if min(self._read) == len(self._steps):
            self._steps, self._bytes, self._read = [], 0, [0] * len(self._read)


def merged(steps: Sequence[Verified], hidden_states: bool = False) -> Verified:
    """As if one verification had emitted it all, read-only; with the hidden states that emitted tokens were sampled
    from, where they are asked for and all steps have them."""
    if len(steps) == 1:
        return steps[0]
    if not hidden_states and (plain := _merged_simply(steps)):
        return plain
    rows: dict[int, int] = {}
    row_of = np.array([rows.setdefault(i, len(rows)) for step in steps for i in step.ids], np.int64)
    emitted = [tokens for step in steps for tokens in step.emitted]
    counts = np.array([len(tokens) for tokens in emitted], np.int64)
    # Row by row, and within a row in the order of the steps.
    order = np.argsort(np.repeat(row_of, counts), kind="stable")
    ends = np.cumsum(np.bincount(row_of, counts, len(rows)).astype(np.int64))
    hidden = starts = None
    states = [step.hidden for step in steps if step.hidden is not None]
    if hidden_states and len(states) == len(steps):
        before = np.cumsum([0, *(len(s) for s in states[:-1])])
        places = np.concatenate([step.starts + n for step, n in zip(steps, before, strict=True)])
        within = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        at = (np.repeat(places, counts) + within)[order]
        hidden = torch.cat(states).index_select(0, torch.from_numpy(at).to(states[0].device))
        starts = np.concatenate([[0], ends[:-1]])
    accepted = np.bincount(row_of, np.concatenate([step.accepted for step in steps]), len(rows))
    return Verified(
        list(rows),
        np.split(locked(np.concatenate(emitted)[order]), ends[:-1]),
        locked(accepted.astype(np.int64)),
        hidden=hidden,
        starts=starts,
        seconds=sum(step.seconds for step in steps),
    )


def _merged_simply(steps: Sequence[Verified]) -> Verified | None:
    """`merged` of steps of one sequence, or that emitted one token of each of the same sequences, as those without
    drafts do, else None."""
    ids = steps[0].ids
    if any(step.ids is not ids and step.ids != ids for step in steps):
        return None
    emitted = list(chain.from_iterable(step.emitted for step in steps))
    if len(ids) > 1 and set(map(len, emitted)) != {1}:
        return None
    by_row = locked(np.concatenate(emitted).reshape(-1, len(ids)).T.copy())
    accepted = np.concatenate([step.accepted for step in steps]).reshape(-1, len(ids)).sum(axis=0, dtype=np.int64)
    return Verified(list(ids), list(by_row), locked(accepted), seconds=sum(step.seconds for step in steps))
