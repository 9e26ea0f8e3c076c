"""N-gram prompt lookup: the tokens that followed the last few tokens where they first stood in the sequence.

After Saxena (prompt lookup decoding, 2023), which is what vLLM calls `ngram`: a baseline for the suffix automaton, with
the sequence itself as its only memory.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct
from numba import njit

from drafters.base import BaseDrafter, DraftRequest, Proposal, SequenceStart, Verified
from drafters.slots import Slots, with_room
from pipeline.errors import UsageError


class PromptLookupDrafter(BaseDrafter):
    """Copies what followed the last n-gram at its first place in prompt or output."""

    name = "prompt-lookup"

    class Options(Struct, kw_only=True, forbid_unknown_fields=True):
        """The longest n-gram of `min_ngram` to `max_ngram` tokens that occurs earlier gives up to `max_tokens`."""

        min_ngram: Annotated[int, Meta(ge=1)] = 2
        max_ngram: Annotated[int, Meta(ge=1)] = 5
        max_tokens: Annotated[int, Meta(ge=1)] = 10

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or self.Options()
        if self.options.min_ngram > self.options.max_ngram:
            raise UsageError(
                f"drafter {self.name}: min_ngram = {self.options.min_ngram} is more than "
                f"max_ngram = {self.options.max_ngram}"
            )
        self._slots = Slots()
        self._texts, self._lengths = np.zeros((0, 64), np.int64), np.zeros(0, np.int64)
        """prompt and output of each slot, int64 [S, capacity], and how long they are"""
        _copied(self._texts, self._lengths, self._lengths, self._lengths, 1, 1, 1)  # compiled before it counts
        _append(self._texts, self._lengths, self._lengths, self._lengths, np.zeros(1, np.int64))

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        for start in sequences:
            if start.id not in self._slots:
                slot = self._slots.take(start.id)
                self._texts, self._lengths = with_room(self._texts, slot + 1), with_room(self._lengths, slot + 1)
                self._lengths[slot] = 0
                self._append([start.id], np.array(start.prompt_ids, np.int64), np.array([0, len(start.prompt_ids)]))

    def propose(self, request: DraftRequest) -> Proposal:
        tokens, lengths, matches = _copied(
            self._texts, self._lengths, self._slots.of(request.ids), request.budgets,
            self.options.min_ngram, self.options.max_ngram, self.options.max_tokens,
        )  # fmt: skip
        return Proposal(tokens, lengths, matches=matches)

    def observe(self, verified: Verified) -> None:
        self._append(verified.ids, *verified.flat())

    def end(self, ids: Sequence[int]) -> None:
        for i in ids:
            self._slots.free(i)

    def _append(self, ids: Sequence[int], tokens: np.ndarray, borders: np.ndarray) -> None:
        while not _append(self._texts, self._lengths, self._slots.of(ids), tokens, borders):
            self._texts = np.concatenate([self._texts, np.zeros_like(self._texts)], axis=1)


@njit(cache=True)
def _append(texts: np.ndarray, lengths: np.ndarray, slots: np.ndarray, tokens: np.ndarray, borders: np.ndarray) -> bool:
    """Tokens that continue the texts; whether there was room, without which nothing changes."""
    for b in range(len(slots)):
        if lengths[slots[b]] + borders[b + 1] - borders[b] > texts.shape[1]:
            return False
    for b in range(len(slots)):
        for i in range(borders[b], borders[b + 1]):
            texts[slots[b], lengths[slots[b]]] = tokens[i]
            lengths[slots[b]] += 1
    return True


@njit(cache=True)
def _copied(
    texts: np.ndarray, lengths: np.ndarray, slots: np.ndarray, budgets: np.ndarray, least: int, most: int, longest: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens int64 [B, K], lengths int64 [B] and matches int64 [B]."""
    width = 0
    for b in range(len(slots)):
        width = max(width, min(budgets[b], longest))
    tokens, counts = np.zeros((len(slots), width), np.int64), np.zeros(len(slots), np.int64)
    matches = np.zeros(len(slots), np.int64)
    for b in range(len(slots)):
        length = lengths[slots[b]]
        text = texts[slots[b], :length]
        end, matches[b] = first_place(text, least, most)
        if matches[b]:
            counts[b] = min(budgets[b], width, length - end)
            tokens[b, : counts[b]] = text[end : end + counts[b]]
    return tokens, counts, matches


@njit(cache=True)
def first_place(text: np.ndarray, least: int, most: int) -> tuple[int, int]:
    """Where the longest n-gram at the end of int64 `text`, `least` <= n <= `most`, first ends earlier; and n, 0 if
    nowhere."""
    best, place, length = least - 1, 0, len(text)
    for end in range(least, length):
        n = 0
        while n < most and n < end and text[end - 1 - n] == text[length - 1 - n]:
            n += 1
        if n > best:
            best, place = n, end
            if n == most:
                break
    return place, best if best >= least else 0
