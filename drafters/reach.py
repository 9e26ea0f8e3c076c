"""How far to ask a drafter that takes time for every token it drafts, before it drafts any."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from drafters.acceptance import CELL, NOMINAL, bucket

FIRST, _MOST = 4, 16
"""tokens: to begin with, and at most"""
_EVERY, _FURTHER = 16, 8
"""askings between two choices, and which of them is for a token more: what one costs and brings stays known"""
_MEMORY = 0.98
"""what an asking counts for beside the next"""
_SPREAD = 0.05
"""variance of widths, in tokens squared, that the guess of a token's time counts for: as long as all else takes"""


@dataclass(slots=True)
class Reach:
    """Of one drafter, with as many sequences as it stands for."""

    tokens: int = FIRST
    """that pay best, as far as is known"""
    accepted: float = math.inf
    """of them, on average"""
    _asked: int = 0
    _chosen_at: int = 0
    """askings that had gone by"""
    _weight: float = 0.0
    _width: float = 0.0
    _seconds: float = 0.0
    """running means"""
    _spread: float = 0.0
    _together: float = 0.0
    """of the widths, and of widths and seconds: variance and covariance"""

    @property
    def next(self) -> int:
        """Tokens to ask for in this step."""
        return min(self.tokens + (self._asked % _EVERY == _FURTHER), _MOST)

    def was_asked(self, width: int, seconds: float) -> None:
        """Drafts of up to `width` tokens took so long."""
        if self._weight:
            seconds = min(seconds, 2 * self.seconds(width))  # a pause of the machine is no cost
        self._asked += 1
        self._weight = _MEMORY * self._weight + 1
        rate = 1 / self._weight
        off, late = width - self._width, seconds - self._seconds
        self._width, self._seconds = self._width + rate * off, self._seconds + rate * late
        self._spread = (1 - rate) * (self._spread + rate * off * off)
        self._together = (1 - rate) * (self._together + rate * off * late)

    @property
    def _each(self) -> float:
        """Seconds that a token more takes."""
        guess = self._seconds / (self._width + 1)
        return max((self._together + _SPREAD * guess) / (self._spread + _SPREAD), 0.0)

    def seconds(self, tokens: int) -> float:
        """Of asking for so many."""
        return max(self._seconds + self._each * (tokens - self._width), 0.0)

    @property
    def due(self) -> bool:
        """Whether enough askings have gone by to choose again: at first soon."""
        return self._asked != self._chosen_at and (self._asked % _EVERY == 0 or self._asked in (2, 4, 8))

    def choose(self, counts: np.ndarray, rows: int, seconds: Callable[[int, int], float], overhead: float) -> bool:
        """The tokens that promise most a second where all of them are verified; whether that is another number now.

        Args:
            counts: float64 [MATCHES, CONFIDENCES, DEPTHS, (accepted, seen)], of the drafter's tokens.
            rows: sequences.
            seconds: of a verification, by sequences and tokens.
            overhead: seconds of a step beside both.
        """
        self._chosen_at = self._asked
        before, best = self.tokens, 0.0
        by_depth = counts.sum((0, 1))
        expected, survival, chance = 1.0, 1.0, NOMINAL[0]
        for tokens in range(1, _MOST + 1):
            accepted, seen = by_depth[bucket(-1, -1.0, tokens - 1)[2]]
            chance = (accepted + chance * CELL) / (seen + CELL)
            survival *= chance
            expected += survival
            rate = rows * expected / (seconds(rows, rows * (1 + tokens)) + overhead + self.seconds(tokens))
            if rate > best:
                best, self.tokens, self.accepted = rate, tokens, expected - 1
        return self.tokens != before
