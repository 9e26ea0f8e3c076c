"""What an arbiter decided in a step, and what it must not look at: how a draft that was drawn came out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from drafters.base import Proposal
from drafters.stack import Stack


@dataclass(slots=True)
class Step:
    """What was proposed and chosen, until the step is observed; of the D drafters from the first to the last that was
    asked."""

    ids: Sequence[int]
    drafters: slice
    drawn: np.ndarray | None
    """bool [D, B], drafts drawn from probabilities; None: there are none"""
    stack: Stack
    choice: np.ndarray
    """int64 [B], drafter, counted from the first of them; -1: none"""
    granted: np.ndarray
    """int64 [B], tokens of the choice that were to be verified, if it has as many"""
    drafted: int = 0

    def taught_lengths(self) -> np.ndarray:
        """int64 [D, B], tokens that the verification says something about."""
        lengths = self.stack.lengths
        if self.drawn is not None:
            lengths = lengths.copy()  # they may be those of a proposal that was handed out
            # What was drawn but not verified teaches nothing. A draft that ended before what was granted teaches that
            # it does: its missing tokens count as rejected.
            for index, drawn in enumerate(self.drawn):
                lengths[index, drawn] = np.where(self.choice == index, self.granted, 0)[drawn]
        return lengths


def drawn_rows(proposal: Proposal) -> np.ndarray:
    """bool [B], rows whose draft was drawn from probabilities."""
    if proposal.probabilities is None:
        return np.zeros(len(proposal.lengths), np.bool_)
    return proposal.lengths > 0 if proposal.sampled is None else proposal.sampled & (proposal.lengths > 0)


def as_if_all(index: int, asked: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
    """Copies of arrays [D, B, ...] in which those rows of drafter `index` that it was not asked for are like those that
    it was, bool `asked` [B]."""
    rows, copies = np.flatnonzero(asked), []
    for array in arrays:
        copies.append(array.copy())
        copies[-1][index] = array[index, rows[np.arange(len(asked)) % len(rows)]]
    return copies


def blind(
    drawn: np.ndarray, usual: np.ndarray, lengths: np.ndarray, matches: np.ndarray, confidences: np.ndarray
) -> None:
    """Hides what may depend on drawn tokens: how long a draft became, what it was found by, and every confidence but
    the first, which the guard takes from the stated distribution.

    Args:
        drawn: bool [B].
        usual: int64 [B], the length to assume instead.
        lengths: int64 [B], changed.
        matches: int64 [B], changed.
        confidences: float32 [B, K], changed.
    """
    lengths[drawn], matches[drawn] = usual[drawn], -1
    confidences[drawn] = confidences[drawn, :1]
