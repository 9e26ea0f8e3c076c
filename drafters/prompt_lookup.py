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
        first_place(np.zeros(1, np.int64), 1, 1)  # compiled before the first sequence waits for it
        self._texts: dict[int, np.ndarray] = {}
        """int64 [capacity], prompt and output"""
        self._lengths: dict[int, int] = {}

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        for start in sequences:
            self._texts[start.id], self._lengths[start.id] = np.zeros(0, np.int64), 0
            self._append(start.id, start.prompt_ids)

    def propose(self, request: DraftRequest) -> Proposal:
        options, rows = self.options, len(request.ids)
        width = min(int(request.budgets.max(initial=0)), options.max_tokens)
        tokens, lengths, matches = np.zeros((rows, width), np.int64), np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        for row, (i, budget) in enumerate(zip(request.ids, request.budgets.tolist(), strict=True)):
            text = self._texts[i][: self._lengths[i]]
            end, matches[row] = first_place(text, options.min_ngram, options.max_ngram)
            draft = text[end : end + min(budget, width)] if matches[row] else text[:0]
            lengths[row] = len(draft)
            tokens[row, : len(draft)] = draft
        return Proposal(tokens, lengths, matches=matches)

    def observe(self, verified: Verified) -> None:
        for i, emitted in zip(verified.ids, verified.emitted, strict=True):
            self._append(i, emitted)

    def end(self, ids: Sequence[int]) -> None:
        for i in ids:
            self._texts.pop(i, None)
            self._lengths.pop(i, None)

    def _append(self, sequence: int, tokens: np.ndarray) -> None:
        text, length = self._texts[sequence], self._lengths[sequence]
        if length + len(tokens) > len(text):
            text = np.concatenate([text[:length], np.zeros(length + 2 * len(tokens) + 64, np.int64)])
            self._texts[sequence] = text
        text[length : length + len(tokens)] = tokens
        self._lengths[sequence] = length + len(tokens)


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
