"""How likely a draft token is accepted: counts by drafter, match length, the drafter's own confidence, and depth.

A token counts as observed where all before it in the draft were accepted. Emitted tokens are known whether a draft was
verified or not, so a deterministic draft teaches even when it was not chosen, up to the first token it got wrong.
"""

import numpy as np
from numba import njit

MATCHES, CONFIDENCES, DEPTHS = 8, 8, 5
"""buckets: matched tokens unknown or 0, 1, 2, 3-4, 5-8, 9-16, 17-32, more; confidence unknown, then up to 0.4, 0.6,
0.7, 0.8, 0.9, 0.97, more; depth 1, 2, 3-4, 5-8, more"""
MOST = 400.0
"""A cell that has seen more is halved: policies change, and what they did long ago is forgotten."""
NOMINAL = (0.5, 0.3, 0.5, 0.65, 0.75, 0.85, 0.94, 0.98)
"""chance of acceptance that a confidence stands for, until more is known"""
CELL, COARSE = 6.0, 12.0
"""weight of the coarser estimate beside a cell's own counts, and of the nominal chance, in observations"""


@njit(cache=True)
def bucket(match: int, confidence: float, depth: int) -> tuple[int, int, int]:
    """Cell of a token: matched tokens (-1: unknown), confidence (negative: unknown), depth from 0."""
    m = 0
    while m < MATCHES - 1 and match > (0, 1, 2, 4, 8, 16, 32)[m]:
        m += 1
    c = 0
    if confidence >= 0:
        c = 1
        while c < CONFIDENCES - 1 and confidence > (0.0, 0.4, 0.6, 0.7, 0.8, 0.9, 0.97)[c]:
            c += 1
    d = 0
    while d < DEPTHS - 1 and depth >= (1, 2, 4, 8)[d]:
        d += 1
    return m, c, d


@njit(cache=True)
def refresh(counts: np.ndarray, chances: np.ndarray) -> None:
    """Chances float64 [D, M, C, DEPTHS] of acceptance from counts [D, M, C, DEPTHS, (accepted, seen)].

    A cell leans on all cells of its confidence, these on what the confidence stands for: the mean of a Beta
    distribution each time.
    """
    for drafter in range(counts.shape[0]):
        for c in range(CONFIDENCES):
            accepted = seen = 0.0
            for m in range(MATCHES):
                for d in range(DEPTHS):
                    accepted += counts[drafter, m, c, d, 0]
                    seen += counts[drafter, m, c, d, 1]
            similar = (accepted + NOMINAL[c] * COARSE) / (seen + COARSE)
            for m in range(MATCHES):
                for d in range(DEPTHS):
                    cell = counts[drafter, m, c, d]
                    chances[drafter, m, c, d] = (cell[0] + similar * CELL) / (cell[1] + CELL)


@njit(cache=True)
def learn(
    counts: np.ndarray,
    chances: np.ndarray,
    tokens: np.ndarray,
    lengths: np.ndarray,
    matches: np.ndarray,
    confidences: np.ndarray,
    emitted: np.ndarray,
    borders: np.ndarray,
) -> None:
    """Takes in what was emitted after the drafts of D drafters for B rows; lengths 0: nothing to learn there.

    Args:
        counts, chances: as for `refresh`; changed.
        tokens: int64 [D, B, K].
        lengths: int64 [D, B].
        matches: int64 [D, B].
        confidences: float32 [D, B, K].
        emitted: int64 [N], those of row b at `borders[b]:borders[b + 1]`.
        borders: int64 [B + 1].
    """
    for drafter in range(tokens.shape[0]):
        for b in range(tokens.shape[1]):
            for k in range(min(lengths[drafter, b], borders[b + 1] - borders[b])):
                m, c, d = bucket(matches[drafter, b], confidences[drafter, b, k], k)
                cell = counts[drafter, m, c, d]
                if cell[1] >= MOST:
                    cell[0] *= 0.5
                    cell[1] *= 0.5
                cell[1] += 1
                if tokens[drafter, b, k] != emitted[borders[b] + k]:
                    break
                cell[0] += 1
    refresh(counts, chances)
