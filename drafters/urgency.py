"""How far the members of each group are: what a token of which sequence is worth."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numba import njit

from drafters.base import SequenceStart, Verified
from drafters.slots import Slots, with_room


class GroupProgress:
    """Live sequences, their lengths and their groups."""

    def __init__(self) -> None:
        self._slots, self._group_slots = Slots(), Slots()
        self._group = np.zeros(0, np.int64)
        """group's slot, of each sequence's slot"""
        self._generated = np.zeros(0, np.int64)
        """tokens of each sequence's slot"""
        self._groups: dict[int, int] = {}
        """of each live sequence"""
        self._begun, self._live = np.zeros(0, np.int64), np.zeros(0, np.int64)
        """sequences of each group's slot"""

    def begin(self, starts: Sequence[SequenceStart]) -> None:
        """Sequences that are known already stay as they are."""
        for start in starts:
            if start.id in self._slots:
                continue
            if start.group not in self._group_slots:
                group = self._group_slots.take(start.group)
                self._begun, self._live = with_room(self._begun, group + 1), with_room(self._live, group + 1)
                self._begun[group] = self._live[group] = 0
            slot, group = self._slots.take(start.id), int(self._group_slots.of([start.group])[0])
            self._group, self._generated = with_room(self._group, slot + 1), with_room(self._generated, slot + 1)
            self._group[slot], self._generated[slot] = group, len(start.response_ids)
            self._groups[start.id] = start.group
            self._begun[group] += 1
            self._live[group] += 1

    def observe(self, steps: Sequence[Verified]) -> None:
        """Sequences got longer."""
        for ids, same in groupby(steps, key=lambda step: step.ids):
            lengths = np.array([len(tokens) for step in same for tokens in step.emitted], np.int64)
            self._generated[self._slots.of(ids)] += lengths.reshape(-1, len(ids)).sum(axis=0)

    def end(self, ids: Sequence[int]) -> None:
        """Unknown ones are fine."""
        for i in ids:
            slot = self._slots.free(i)
            if slot is not None:
                self._live[self._group[slot]] -= 1
                group = self._groups.pop(i)
                if not self._live[self._group[slot]]:
                    self._group_slots.free(group)

    def urgency(self, ids: Sequence[int], weight: float) -> np.ndarray:
        """float64 [B]: 1, and up to `weight` more for the last of a group and for the longest of the batch: whoever
        waits for the group waits for these."""
        if weight == 0 or len(ids) == 1:
            return np.ones(len(ids))
        return _urgency(self._slots.of(ids), self._generated, self._group, self._begun, self._live, weight)


@njit(cache=True)
def _urgency(
    slots: np.ndarray, generated: np.ndarray, group: np.ndarray, begun: np.ndarray, live: np.ndarray, weight: float
) -> np.ndarray:
    mean = max(1.0, generated[slots].mean())
    worth = np.empty(len(slots))
    for b in range(len(slots)):
        over = min(max(generated[slots[b]] / mean - 1, 0.0), 1.0)
        g = group[slots[b]]
        worth[b] = 1 + weight * max(over, 1 - live[g] / begun[g])
    return worth
