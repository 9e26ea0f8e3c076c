"""What drafts are taken from: the same prompt's texts, all prompts' recent texts, corpora; bounded in bytes.

Every live sequence stands in several automata at once, its tracks:

- `PROMPT`: one automaton for each prompt, by the prompt's content. It holds the prompt, what the sequences of its
  groups have generated so far, and what they generated in earlier epochs; old policies' text is as good a guess as any.
- `RECENT`: one automaton of what all sequences generate, until it is full; then another begins.
- `BEFORE`: the one that was full, only followed.
- from `CORPORA` on: automata built beforehand from files, only followed.

Kept text never outgrows `max_bytes` by more than the live sequences need: whole automata go, the prompts that were used
longest ago first, none that a live sequence stands in.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from drafters.base import SequenceStart
from drafters.slots import Slots, with_room
from drafters.suffix import matching
from drafters.suffix import states as k
from drafters.suffix.corpus import Corpus
from drafters.suffix.pool import AutomatonPool

PROMPT, RECENT, BEFORE, CORPORA = range(4)
_TAIL = 8
"""tokens of the prompt that a sequence's text begins with outside its prompt's own automaton"""
_FULL = 3 / 8
"""the recent automaton, and that of one prompt, is full at this part of the bytes"""
_LARGEST, _SHORT = 1 / 2, 7 / 8
"""the recent one only at this part, as long as all there is takes less than that part"""


@dataclass(slots=True)
class _Prompt:
    automaton: int
    place: int
    """where the prompt ends"""
    users: int = 0
    """live sequences"""


class SuffixMemory:
    """Automata, and where each live sequence stands in them."""

    def __init__(self, max_bytes: int, corpora: Sequence[Corpus] = (), latest: bool = False) -> None:
        """
        Args:
            max_bytes: of kept text; 0 keeps nothing beyond the live sequences of a prompt, and no recent texts.
            corpora: to follow.
            latest: a state's best continuation is its latest one, not its most frequent one.
        """
        self.pool = AutomatonPool(latest)
        self.evicted = 0
        """automata given up for room"""
        self._max_bytes = max_bytes
        self._prompts: OrderedDict[bytes, _Prompt] = OrderedDict()
        """least recently used first"""
        self._slots = Slots()
        """row of each live sequence in the arrays below"""
        self._digests: dict[int, bytes] = {}
        self._recent, self._before = self.pool.new() if max_bytes else -1, -1
        self._corpora = [self.pool.borrow(c.states, c.slots, c.header) for c in corpora]
        tracks = CORPORA + len(corpora)
        self.own = np.arange(tracks) < BEFORE
        """bool [T]"""
        self.automata = np.full((0, tracks), -1, np.int64)
        """[S, T]; -1: none"""
        self.places = np.zeros((0, tracks), np.int64)
        self.lengths = np.zeros((0, tracks), np.int64)

    @property
    def held_bytes(self) -> int:
        """Of all automata but the corpora, which are mapped from files."""
        return self.pool.bytes

    @property
    def tokens(self) -> int:
        """Held in `bytes`."""
        return self.pool.tokens() - int(self.pool.heads[self._corpora, k.CLOCK].sum())

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        """Rows int64 [B] of live sequences."""
        return self._slots.of(ids)

    def begin(self, starts: Sequence[SequenceStart]) -> None:
        """Sequences with the tokens they have so far; one that is known already stays where it is."""
        for start in starts:
            if start.id in self._slots:
                continue
            row = self._new_row(start.id)
            # Copies: for arrays that are read-only the compiled parts would be compiled once more.
            prompt, response = np.array(start.prompt_ids, np.int64), np.array(start.response_ids, np.int64)
            self._digests[start.id] = digest = hashlib.blake2b(prompt.tobytes(), digest_size=16).digest()
            known = self._prompt(digest, prompt)
            known.users += 1
            tail = np.concatenate([prompt[-_TAIL:], response])
            self._enter(row, PROMPT, known.automaton, response, known.place, len(prompt))
            if self._recent >= 0:
                self._enter(row, RECENT, self._recent, tail)
            for track, automaton in enumerate([self._before, *self._corpora], BEFORE):
                self.automata[row, track] = automaton
                self.places[row, track] = self.lengths[row, track] = 0
            self._observe(np.array([row]), tail, np.array([0, len(tail)]), ~self.own)
        self._fit()

    def observe(self, ids: Sequence[int], tokens: np.ndarray, borders: np.ndarray) -> None:
        """Tokens int64 [N] that continue sequences, those of the b-th at `borders[b]:borders[b + 1]`."""
        self._observe(self.rows(ids), tokens, borders, None)
        if self._recent >= 0 and self.pool.size(self._recent) > _FULL * self._max_bytes and self._is_full():
            self._turn()

    def end(self, ids: Sequence[int]) -> None:
        """Unknown ones are fine; what they generated stays."""
        for i in ids:
            row = self._slots.free(i)
            if row is not None:
                self.automata[row] = -1
                known = self._prompts[self._digests.pop(i)]
                known.users -= 1
                if not known.users:
                    self.pool.trim(known.automaton)
        self._fit()

    def _prompt(self, digest: bytes, tokens: np.ndarray) -> _Prompt:
        known = self._prompts.get(digest)
        if known and not known.users and self.pool.size(known.automaton) > _FULL * self._max_bytes:
            self._forget(self._prompts.pop(digest).automaton)
        if digest not in self._prompts:
            automaton = self.pool.new(states=3 * len(tokens) // 2 + 2, slots=len(tokens) // 2)
            self._prompts[digest] = _Prompt(automaton, self.pool.extend(automaton, tokens))
        self._prompts.move_to_end(digest)
        return self._prompts[digest]

    def _enter(self, row: int, track: int, automaton: int, tokens: np.ndarray, place: int = 0, length: int = 0) -> None:
        self.automata[row, track] = automaton
        self.places[row, track] = self.pool.extend(automaton, tokens, place)
        self.lengths[row, track] = length + len(tokens)

    def _observe(self, rows: np.ndarray, tokens: np.ndarray, borders: np.ndarray, only: np.ndarray | None) -> None:
        """`only`: bool [T], tracks to take the tokens into."""
        done = np.zeros((len(rows), len(self.own)), np.int64)
        if only is not None:
            done[:, ~only] = len(tokens)
        while True:
            full = matching.observe(
                self.pool.heads, self.automata, self.places, self.lengths, self.own, rows, tokens, borders, done,
                self.pool.latest,
            )  # fmt: skip
            if full < 0:
                return
            self.pool.grow(full)

    def _is_full(self) -> bool:
        """The recent automaton, which has its part: whether others need room."""
        large = self.pool.size(self._recent) > _LARGEST * self._max_bytes
        return large or self.pool.bytes > _SHORT * self._max_bytes

    def _turn(self) -> None:
        """The recent automaton is full: it becomes the one before."""
        if self._before >= 0:
            self._forget(self._before)
        self._before, self._recent = self._recent, self.pool.new()
        self.pool.trim(self._before)
        self._fit()

    def _forget(self, automaton: int) -> None:
        self.automata[self.automata == automaton] = -1
        self.pool.free(automaton)
        self.evicted += 1

    def _fit(self) -> None:
        if self.pool.bytes <= self._max_bytes:
            return
        for digest in list(self._prompts):
            if self.pool.bytes <= self._max_bytes:
                return
            if not self._prompts[digest].users:
                self._forget(self._prompts.pop(digest).automaton)
        if self.pool.bytes > self._max_bytes and self._before >= 0:
            self._forget(self._before)
            self._before = -1

    def _new_row(self, sequence: int) -> int:
        row = self._slots.take(sequence)
        self.automata = with_room(self.automata, row + 1, -1)
        self.places, self.lengths = with_room(self.places, row + 1), with_room(self.lengths, row + 1)
        return row
