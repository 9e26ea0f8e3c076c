"""The memory of suffix automata: a block of states and a table of transitions each; a block grows by half, or by an
eighth where it is large, a table to its double."""

from dataclasses import dataclass, field

import numpy as np

from drafters.suffix import states as k

_FIRST_STATES, _FIRST_SLOTS = 64, 32
_MANY_STATES = 1 << 17
"""4 MiB: room for half as many more, unused, would be worth other texts"""
_LEAST_SLOTS = 8
"""a quarter of the table stays free, so that every probe ends"""


@dataclass(slots=True)
class _Blocks:
    states: np.ndarray
    """int32 [states, STATE_WIDTH]"""
    slots: np.ndarray
    """int32 [slots, SLOT_WIDTH]"""


@dataclass(slots=True)
class AutomatonPool:
    """Automata by number; a freed number is used again."""

    latest: bool = False
    """whether a state's best transition is its latest one, not its most frequent one"""
    heads: np.ndarray = field(default_factory=lambda: np.zeros((8, k.HEADER_WIDTH), np.int64))
    """int64 [A, HEADER_WIDTH], what the kernels read"""
    bytes: int = 0
    """of all blocks that were allocated here"""
    _blocks: dict[int, _Blocks] = field(default_factory=dict)
    _borrowed: set[int] = field(default_factory=set)
    _free: list[int] = field(default_factory=list)

    def new(self, states: int = _FIRST_STATES, slots: int = _FIRST_SLOTS) -> int:
        """An empty automaton with room for so many states; slots are rounded up to a power of two."""
        blocks = _Blocks(
            np.empty((states, k.STATE_WIDTH), np.int32),
            np.zeros((1 << (max(slots, _LEAST_SLOTS) - 1).bit_length(), k.SLOT_WIDTH), np.int32),
        )
        blocks.states[0] = (-1, 0, 0, 0, -1, 0, 0, 0)
        number = self._enter(blocks)
        self.heads[number, k.STATES] = 1
        self.bytes += _size(blocks)
        return number

    def borrow(self, states: np.ndarray, slots: np.ndarray, header: np.ndarray) -> int:
        """A finished automaton whose blocks are somebody else's, mapped from a file say; it is only followed."""
        number = self._enter(_Blocks(states, slots))
        self._borrowed.add(number)
        for column in (k.STATES, k.SLOTS, k.CLOCK, k.WIDEST):
            self.heads[number, column] = header[column]
        return number

    def free(self, number: int) -> None:
        if number in self._borrowed:
            self._borrowed.discard(number)
        else:
            self.bytes -= _size(self._blocks[number])
        del self._blocks[number]
        self.heads[number] = 0
        self._free.append(number)

    def extend(self, number: int, tokens: np.ndarray, place: int = 0, counted: bool = True) -> int:
        """Appends int64 `tokens` to the document that stands at `place` (0: a new one); returns its new place."""
        done, place = k.extend(self.heads[number], tokens, 0, place, counted, self.latest)
        while done < len(tokens):
            self.grow(number)
            done, place = k.extend(self.heads[number], tokens, done, place, counted, self.latest)
        return int(place)

    def grow(self, number: int) -> None:
        """Room for at least one append more; blocks move, so views of them are stale."""
        head, blocks = self.heads[number], self._blocks[number]
        before = _size(blocks)
        if head[k.STATES] + 2 > head[k.STATE_ROOM]:
            room = len(blocks.states)
            room = room * 3 // 2 if room < _MANY_STATES else room * 9 // 8
            states = np.empty((max(_FIRST_STATES, room), k.STATE_WIDTH), np.int32)
            states[: head[k.STATES]] = blocks.states[: head[k.STATES]]
            blocks.states = states
            self._point(number)
        else:
            slots = np.zeros((2 * len(blocks.slots), k.SLOT_WIDTH), np.int32)
            k.rehash(head, blocks.slots, slots)
            blocks.slots = slots
            self._point(number)
        self.bytes += _size(blocks) - before

    def trim(self, number: int) -> None:
        """Gives back room for states that an automaton which nobody extends does not need now."""
        head, blocks = self.heads[number], self._blocks[number]
        self.bytes -= blocks.states.nbytes
        blocks.states = blocks.states[: head[k.STATES]].copy()
        self.bytes += blocks.states.nbytes
        self._point(number)

    def blocks(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """States and slots as they are now, up to the last in use."""
        blocks = self._blocks[number]
        return blocks.states[: self.heads[number, k.STATES]], blocks.slots

    def size(self, number: int) -> int:
        """Bytes of one automaton."""
        return _size(self._blocks[number])

    def tokens(self) -> int:
        """Tokens that were appended to the automata that are there now."""
        return int(self.heads[:, k.CLOCK].sum())

    def _enter(self, blocks: _Blocks) -> int:
        if not self._free:
            count = len(self.heads)
            used = len(self._blocks)
            if used == count:
                self.heads = np.concatenate([self.heads, np.zeros_like(self.heads)])
            self._free.append(used)
        number = self._free.pop()
        self._blocks[number] = blocks
        self._point(number)
        return number

    def _point(self, number: int) -> None:
        head, blocks = self.heads[number], self._blocks[number]
        head[k.STATES_AT], head[k.STATE_ROOM] = blocks.states.ctypes.data, len(blocks.states)
        head[k.SLOTS_AT], head[k.SLOT_ROOM] = blocks.slots.ctypes.data, len(blocks.slots)


def _size(blocks: _Blocks) -> int:
    return blocks.states.nbytes + blocks.slots.nbytes
