"""How far to ask a drafter that takes time for every token it drafts, before it drafts any."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from drafters.acceptance import CELL, NOMINAL, bucket

FIRST, _MOST = 4, 16
"""tokens: to begin with, and at most"""
_EVERY = 16
"""askings between two choices"""
_BESIDE = (0, 1, 0, -1)
"""askings by turns: of two in four for a token more, or less, what one costs and brings stays known"""
_FURTHER = 2
"""tokens beyond the longest draft so far that may be chosen: what lies far ahead is a guess"""
_REFUSALS = 8
"""askings for more than its longest draft, after which it is taken to draft no more than that"""
_MARGIN = 1.01
"""A further token must promise this much more: where the curve is flat, the shorter draft is the surer."""
_MEMORY = 0.98
"""what an asking counts for beside the next"""
_SPREAD = 0.05
"""variance of widths, in tokens squared, that the guess of a token's time counts for: as long as all else takes"""


@dataclass(slots=True)
class Line:
    """Running means of widths and of what is seen at them, and how the one follows the other."""

    weight: float = 0.0
    width: float = 0.0
    height: float = 0.0
    _spread: float = 0.0
    _together: float = 0.0
    """variance of the widths, and covariance"""

    def add(self, width: float, height: float) -> None:
        self.weight = _MEMORY * self.weight + 1
        rate = 1 / self.weight
        off, above = width - self.width, height - self.height
        self.width, self.height = self.width + rate * off, self.height + rate * above
        self._spread = (1 - rate) * (self._spread + rate * off * off)
        self._together = (1 - rate) * (self._together + rate * off * above)

    def slope(self, guess: float) -> float:
        return (self._together + _SPREAD * guess) / (self._spread + _SPREAD)

    def at(self, width: float, slope: float) -> float:
        return self.height + slope * (width - self.width)


@dataclass(slots=True)
class Reach:
    """Of one drafter, with as many sequences as it stands for."""

    tokens: int = FIRST
    """that pay best, as far as is known"""
    accepted: float = math.inf
    """of them, on average"""
    _widest: int = 0
    """draft that it made"""
    _refusals: int = 0
    """askings for more than that, without a longer draft"""
    _asked: int = 0
    _chosen_at: int = 0
    """askings that had gone by"""
    _asking: Line = field(default_factory=Line)
    """seconds"""
    _verifying: Line = field(default_factory=Line)
    """seconds beyond those that all drafters' drafts of this width take: caches are colder after some than others"""

    @property
    def next(self) -> int:
        """Tokens to ask for in this step."""
        return min(max(self.tokens + _BESIDE[self._asked % len(_BESIDE)], 1), _MOST)

    @property
    def known(self) -> bool:
        """Whether its time was ever measured."""
        return self._asking.weight > 0

    @property
    def settled(self) -> bool:
        """Whether it was ever chosen."""
        return math.isfinite(self.accepted)

    def was_asked(self, width: int, seconds: float) -> None:
        """Drafts of up to `width` tokens took so long."""
        if self.known:
            if seconds < self.seconds(width) / 2:
                self._asking = Line()  # what came before was a pause, or compiling
            else:
                seconds = min(seconds, 2 * self.seconds(width))  # a pause of the machine is no cost
        if width > self._widest:
            self._widest, self._refusals = width, 0
        elif self.next > self._widest:
            self._refusals += 1
        self._asked += 1
        self._asking.add(width, seconds)

    def was_verified(self, width: float, seconds: float, usual: float) -> None:
        """Whole drafts of `width` tokens, on average, took so long, where `usual` was expected."""
        self._verifying.add(width, min(seconds, 2 * usual) - usual)

    def seconds(self, tokens: int) -> float:
        """Of asking for so many."""
        slope = max(self._asking.slope(self._asking.height / (self._asking.width + 1)), 0.0)
        return max(self._asking.at(tokens, slope), 0.0)

    def beyond(self, tokens: float) -> float:
        """Seconds that verifying so many takes beyond what is usual."""
        return self._verifying.at(tokens, max(self._verifying.slope(0.0), 0.0))

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
        further = 0 if self._refusals >= _REFUSALS else _FURTHER
        for tokens in range(1, min(_MOST, self._widest + further) + 1):
            accepted, seen = by_depth[bucket(-1, -1.0, tokens - 1)[2]]
            chance = (accepted + chance * CELL) / (seen + CELL)
            survival *= chance
            expected += survival
            verifying = seconds(rows, rows * (1 + tokens)) + self.beyond(tokens)
            rate = rows * expected / (verifying + overhead + self.seconds(tokens))
            if rate > best * _MARGIN:
                best, self.tokens, self.accepted = rate, tokens, expected - 1
        return self.tokens != before
