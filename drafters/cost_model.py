"""Seconds of a verification, by sequences and tokens: measured once, then corrected by every step.

t(B, N) for B sequences with N tokens in all is a table over B and N / B, linear in N between its places and
logarithmic in B. A step's measured time moves the whole table, quickly, and the places around it, slowly: what a busy
machine does to all steps alike does not bend the curve, and what one size really costs does.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numba import njit

ROWS = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256], np.float64)
PER_ROW = np.array([1, 1 + 1e-9, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 32], np.float64)
"""places of the table: sequences, and tokens a sequence. A step without any draft has a place of its own: the first
draft of a batch may cost more than its tokens, where drafts are verified by another way than none"""
_WHOLE_RATE, _PLACE_RATE, _PLAIN_RATE = 0.1, 0.03, 0.1
"""of a step's surprise, how much moves all, and of what is left, how much moves its place, once many steps have been
seen; more of one without drafts, which where all would draft are seldom, and made for this. The n-th step moves all by
1/n and the n-th at a place this by 1/(n + 1): what steps really take soon outweighs what was guessed before, and the
machine's speed is known before the curve is bent"""
_MEASURED = 20.0
"""steps at a place that a measurement of it, or of its neighbours, counts for"""
_MOST_SURPRISE = 0.7
"""A step may be taken to be off by this factor's logarithm at most: a pause of the machine is no cost. All and the
step's place are moved by the same surprise: if pauses moved all by more, the calm steps after them would move their
place back for it, and what was not tried meanwhile would seem ever dearer beside it."""


class CostModel:
    """t(B, N); attributes are what the compiled decision reads.

    Attributes:
        table: float64 [ROWS, PER_ROW], seconds.
        scale: [1], what all of it is multiplied with.
    """

    def __init__(self, table: np.ndarray | None = None, learns: bool = True) -> None:
        """Without a table: a guess, 32 tokens for twice the time of one, which the first steps correct."""
        guess = 0.01 * (1 + ROWS[:, None] * PER_ROW / 32)
        self.table = guess if table is None else np.array(table, np.float64)
        self.scale = np.ones(1)
        self._met = np.zeros(self.table.shape)
        """how often a step was at each place, fractions where it was between"""
        self._steps = np.zeros(1)
        self.learns = learns

    @staticmethod
    def of(seconds: Callable[[int, float], float], learns: bool = False) -> "CostModel":
        """From a known function of sequences and tokens, fractions of tokens among them; by default it stays."""
        table = [[seconds(int(rows), rows * per_row) for per_row in PER_ROW] for rows in ROWS]
        return CostModel(np.array(table), learns)

    def seconds(self, rows: int, tokens: int) -> float:
        """Of a verification of `rows` sequences, `tokens` in all."""
        return float(verification_seconds(self.table, self.scale[0], rows, tokens))

    def observe(self, rows: int, tokens: int, seconds: float) -> None:
        """A verification took so long."""
        if self.learns and seconds > 0:
            _correct(self.table, self._met, self.scale, self._steps, rows, tokens, seconds)

    def observe_plain(self, steps: Sequence[tuple[int, float]]) -> None:
        """Verifications without drafts, in order: sequences, and how long it took."""
        if self.learns and steps:
            _correct_plain(self.table, self._met, self.scale, self._steps, np.array(steps, np.float64))

    def plain_steps(self, rows: int) -> float:
        """How many steps without drafts of about so many sequences its knowledge of them rests on."""
        i, u = _place(ROWS, float(rows), True)
        return float((1 - u) * self._met[i, 0] + u * self._met[i + 1, 0])

    def fit(self, measured: dict[tuple[int, int], float]) -> None:
        """Takes measurements (sequences, tokens) -> seconds over: each is met, the places between them follow.

        Every place is moved by the mean of the measurements' surprises, weighted by closeness in both directions.
        """
        if not measured:
            return
        before = self.table.copy()
        points = np.array([[np.log2(rows), np.log2(tokens / rows)] for rows, tokens in measured])
        surprise = np.array([np.log(s / self.seconds(*size)) for size, s in measured.items()])
        for i, rows in enumerate(ROWS):
            for j, per_row in enumerate(PER_ROW):
                distance = np.abs(points - [np.log2(rows), np.log2(per_row)]) @ [1.0, 1.0]
                weight = 1.0 / (1e-3 + distance**2)
                self.table[i, j] = before[i, j] * np.exp((weight * surprise).sum() / weight.sum())
        # More tokens are never taken to be cheaper: a noisy measurement would send every draft there.
        self.table = np.maximum.accumulate(self.table, axis=1)
        self._met[:] = _MEASURED


@njit(cache=True)
def _place(places: np.ndarray, value: float, logarithmic: bool) -> tuple[int, float]:
    """The interval that holds the value, and how far in it lies; beyond the last place it goes on straight."""
    i = 0
    while i < len(places) - 2 and value >= places[i + 1]:
        i += 1
    low, high = places[i], places[i + 1]
    if logarithmic:
        return i, min(max(np.log2(value / low) / np.log2(high / low), 0.0), 1.0)
    return i, max((value - low) / (high - low), 0.0)


@njit(cache=True)
def verification_seconds(table: np.ndarray, scale: float, rows: int, tokens: int) -> float:
    """Interpolated; beyond the most sequences of the table in proportion to them."""
    i, u = _place(ROWS, float(rows), True)
    j, v = _place(PER_ROW, tokens / rows, False)
    low = table[i, j] + v * (table[i, j + 1] - table[i, j])
    high = table[i + 1, j] + v * (table[i + 1, j + 1] - table[i + 1, j])
    return scale * low ** (1 - u) * high**u * max(1.0, rows / ROWS[-1])


@njit(cache=True)
def _correct(
    table: np.ndarray, met: np.ndarray, scale: np.ndarray, steps: np.ndarray, rows: int, tokens: int, seconds: float
) -> None:
    surprise = np.log(seconds / verification_seconds(table, scale[0], rows, tokens))
    if steps[0] >= 3:
        surprise = min(max(surprise, -_MOST_SURPRISE), _MOST_SURPRISE)
    whole = max(_WHOLE_RATE, 1.0 / (steps[0] + 1.0))
    steps[0] += 1
    scale[0] *= np.exp(whole * surprise)
    left, rate = (1 - whole) * surprise, _PLAIN_RATE if tokens == rows else _PLACE_RATE
    i, u = _place(ROWS, float(rows), True)
    j, v = _place(PER_ROW, tokens / rows, False)
    v = min(v, 1.0)
    for a, weight_a in ((i, 1 - u), (i + 1, u)):
        for b, weight_b in ((j, 1 - v), (j + 1, v)):
            weight = weight_a * weight_b
            met[a, b] += weight
            table[a, b] *= np.exp(max(rate, 1.0 / (met[a, b] + 1.0)) * weight * left)
        if weight_a > 0:
            _level(table[a], met[a])


@njit(cache=True)
def _correct_plain(table: np.ndarray, met: np.ndarray, scale: np.ndarray, steps: np.ndarray, seen: np.ndarray) -> None:
    for k in range(len(seen)):
        rows = int(seen[k, 0])
        if seen[k, 1] > 0:
            _correct(table, met, scale, steps, rows, rows, seen[k, 1])


@njit(cache=True)
def _level(seconds: np.ndarray, met: np.ndarray) -> None:
    """Makes costs rise with tokens again, by the least change: where they fall, places share their weighted mean (pool
    adjacent violators)."""
    count = len(seconds)
    values, weights, sizes = np.empty(count), np.empty(count), np.empty(count, np.int64)
    blocks = 0
    for j in range(count):
        values[blocks], weights[blocks], sizes[blocks] = seconds[j], met[j] + 1.0, 1
        blocks += 1
        while blocks > 1 and values[blocks - 2] > values[blocks - 1]:
            both = weights[blocks - 2] + weights[blocks - 1]
            values[blocks - 2] += (values[blocks - 1] - values[blocks - 2]) * weights[blocks - 1] / both
            weights[blocks - 2] = both
            sizes[blocks - 2] += sizes[blocks - 1]
            blocks -= 1
    j = 0
    for block in range(blocks):
        seconds[j : j + sizes[block]] = values[block]
        j += sizes[block]
