"""The drafts of several drafters for the same sequences, side by side in arrays that compiled decisions read."""

from collections.abc import Sequence

import numpy as np
from numba import njit

from drafters.base import Proposal

_NO_MATCHES, _NO_CONFIDENCES = np.zeros(0, np.int64), np.zeros((0, 0), np.float32)


class Stack:
    """Drafts of D drafters for B rows, padded to the longest, K tokens.

    Attributes:
        tokens: int64 [D, B, K], -1 for padding.
        lengths: int64 [D, B].
        matches: int64 [D, B], -1: unknown.
        confidences: float32 [D, B, K], negative: unknown.
    """

    __slots__ = ("confidences", "lengths", "matches", "tokens")

    def __init__(self, drafters: int, rows: int, width: int) -> None:
        self.tokens, self.lengths, self.matches, self.confidences = _blank(drafters, rows, width)

    @classmethod
    def of_one(cls, proposal: Proposal) -> "Stack":
        """Of a single drafter, whose proposal a guard has checked; padding holds zeros."""
        stack, (rows, width) = cls.__new__(cls), proposal.token_ids.shape
        matches, confidences = proposal.matches, proposal.confidences
        stack.tokens, stack.lengths = proposal.token_ids[None], proposal.lengths[None]
        stack.matches = np.full((1, rows), -1, np.int64) if matches is None else matches[None]
        stack.confidences = np.full((1, rows, width), -1, np.float32) if confidences is None else confidences[None]
        return stack

    def put(self, index: int, proposal: Proposal) -> None:
        """A proposal that a guard has checked, of the drafter `index`."""
        if not proposal.token_ids.shape[1]:
            return
        matches, confidences = proposal.matches, proposal.confidences
        _put(
            self.tokens, self.lengths, self.matches, self.confidences, index, proposal.token_ids, proposal.lengths,
            _NO_MATCHES if matches is None else matches,
            _NO_CONFIDENCES if confidences is None else confidences,
        )  # fmt: skip

    def chosen(self, choice: np.ndarray, granted: np.ndarray, names: Sequence[str]) -> Proposal:
        """Row b is the beginning, up to `granted[b]` tokens, of drafter `choice[b]`'s draft; -1 chooses none. For
        drafts without probabilities."""
        tokens, lengths, matches, confidences = _chosen(
            self.tokens, self.lengths, self.matches, self.confidences, choice, granted
        )
        by = [names[index] if index >= 0 else "" for index in choice.tolist()]
        return Proposal(tokens, lengths, None, None, None, by, matches, confidences)


@njit(cache=True)
def _blank(drafters: int, rows: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.full((drafters, rows, width), -1, np.int64),
        np.zeros((drafters, rows), np.int64),
        np.full((drafters, rows), -1, np.int64),
        np.full((drafters, rows, width), np.float32(-1)),
    )


@njit(cache=True)
def _put(
    tokens: np.ndarray, lengths: np.ndarray, matches: np.ndarray, confidences: np.ndarray, index: int,
    ids: np.ndarray, counts: np.ndarray, matched: np.ndarray, confident: np.ndarray,
) -> None:  # fmt: skip
    for b in range(len(counts)):
        lengths[index, b] = counts[b]
        if len(matched):
            matches[index, b] = matched[b]
        for k in range(counts[b]):
            tokens[index, b, k] = ids[b, k]
        if len(confident):
            for k in range(ids.shape[1]):
                confidences[index, b, k] = confident[b, k]


@njit(cache=True)
def _chosen(
    tokens: np.ndarray, lengths: np.ndarray, matches: np.ndarray, confidences: np.ndarray, choice: np.ndarray,
    granted: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    rows, width = len(choice), 0
    counts, matched = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    for b in range(rows):
        if choice[b] >= 0:
            counts[b] = min(granted[b], lengths[choice[b], b])
            width = max(width, counts[b])
    ids, confident = np.zeros((rows, width), np.int64), np.zeros((rows, width), np.float32)
    for b in range(rows):
        if choice[b] >= 0:
            matched[b] = max(matches[choice[b], b], 0)
            for k in range(counts[b]):
                ids[b, k] = tokens[choice[b], b, k]
                confident[b, k] = max(confidences[choice[b], b, k], np.float32(0))
    return ids, counts, matched, confident
