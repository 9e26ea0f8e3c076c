"""The live sequences: those that take part in every draft and verification, row b of it the b-th of them."""

from collections.abc import Iterator
from collections.abc import Sequence as Items

import numpy as np

from drafters.base import Places
from pipeline.engine.native.sequence import Sequence
from pipeline.models.kv_cache import PAGE
from pipeline.sampling.truncation import Truncation


class Batch:
    """Live sequences in rows without gaps, and the table of their pages."""

    def __init__(self, most: int, length: int) -> None:
        """Room for `most` sequences of `length` tokens."""
        self.max_sequences = most
        self._sequences: list[Sequence] = []
        self._tables = np.zeros((most, -(-length // PAGE)), np.int64)
        """row b: pages of live sequence b; what is behind them means nothing"""
        self._ids: tuple[int, ...] | None = None
        self._temperatures = np.zeros(0, np.float32)
        self._truncation: Truncation | None = None
        """both of the sequences while they stay the same, as long as there are `_ids`"""

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __getitem__(self, row: int) -> Sequence:
        return self._sequences[row]

    @property
    def tables(self) -> np.ndarray:
        """int64 [B, most pages]"""
        return self._tables[: len(self._sequences)]

    @property
    def ids(self) -> tuple[int, ...]:
        if self._ids is None:
            self._ids = tuple(s.id for s in self._sequences)
            self._temperatures = np.array([s.temperature for s in self._sequences], np.float32)
            self._truncation = Truncation.of([s.sampling for s in self._sequences])
        return self._ids

    @property
    def temperatures(self) -> np.ndarray:
        """float32 [B]; not to be changed"""
        return self._temperatures if self.ids else np.zeros(0, np.float32)

    @property
    def truncation(self) -> Truncation | None:
        """None where no sequence truncates; not to be changed"""
        return self._truncation if self.ids else None

    @property
    def slots(self) -> np.ndarray:
        """int64 [B], of their settings."""
        return np.array([s.slot for s in self._sequences], np.int64)

    @property
    def counts(self) -> np.ndarray:
        """int64 [B], tokens of each response so far."""
        return np.array([s.count for s in self._sequences], np.int64)

    @property
    def last_tokens(self) -> np.ndarray:
        """int64 [B]"""
        return np.array([s.last_token for s in self._sequences], np.int64)

    @property
    def held(self) -> np.ndarray:
        """int64 [B], tokens whose keys and values are in the cache."""
        return np.array([s.held for s in self._sequences], np.int64)

    @property
    def evicted(self) -> np.ndarray:
        """int64 [B], tokens whose keys and values were there and are not any more."""
        return np.array([s.evicted for s in self._sequences], np.int64)

    def add(self, sequence: Sequence) -> None:
        self._sequences.append(sequence)
        self._ids = None
        self.set_pages(len(self._sequences) - 1)

    def set_pages(self, row: int, known: int = 0) -> None:
        """The sequence in a row has other pages than before, but for the first `known`."""
        pages = self._sequences[row].pages
        self._tables[row, known : len(pages)] = pages[known:]

    def take_out(self, row: int) -> Sequence:
        """The last live sequence moves into the hole."""
        gone, last = self._sequences[row], len(self._sequences) - 1
        self._sequences[row], self._tables[row] = self._sequences[last], self._tables[last]
        self._sequences.pop()
        self._ids = None
        return gone

    def places(self, ids: Items[int], evicts: bool) -> Places:
        """As `drafters.base.Target` says; `evicts`: whether keys and values of any sequence ever go."""
        row_of = {s.id: row for row, s in enumerate(self._sequences)}
        rows = [row_of[i] for i in ids]
        return Places(self._tables[rows], self.held[rows], self.evicted[rows] if evicts else None)
