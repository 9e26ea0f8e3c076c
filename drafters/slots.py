"""Where live sequences stand in a drafter's arrays."""

from collections.abc import Sequence

import numpy as np


class Slots:
    """Numbers from 0 on for live sequences, each used again when its sequence has ended."""

    def __init__(self) -> None:
        self.room = 0
        """one more than the largest number given out so far"""
        self._of: dict[int, int] = {}
        self._free: list[int] = []
        self._asked: tuple[int, ...] = ()
        self._answer = np.zeros(0, np.int64)

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._of

    def take(self, sequence: int) -> int:
        """A number for a sequence that has none."""
        if self._free:
            slot = self._free.pop()
        else:
            slot = self.room
            self.room += 1
        self._of[sequence] = slot
        return slot

    def free(self, sequence: int) -> int | None:
        """The number the sequence had; None: it had none."""
        slot = self._of.pop(sequence, None)
        if slot is not None:
            self._free.append(slot)
            self._asked = ()
        return slot

    def of(self, ids: Sequence[int]) -> np.ndarray:
        """int64 [B]; not to be changed. A batch stays the same for many steps, and so does the answer."""
        if not self._asked or tuple(ids) != self._asked:
            self._asked, self._answer = tuple(ids), np.array([self._of[i] for i in ids], np.int64)
        return self._answer


def with_room(values: np.ndarray, slots: int, fill: int = 0) -> np.ndarray:
    """The array, or a longer one that begins with it, of at least `slots` rows; new ones hold `fill`."""
    if slots <= len(values):
        return values
    more = np.full((max(slots, 2 * len(values), 8) - len(values), *values.shape[1:]), fill, values.dtype)
    return np.concatenate([values, more])
