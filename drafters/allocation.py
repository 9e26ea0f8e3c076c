"""Who drafts for each sequence and how far: the draft tokens that raise expected tokens a second.

A draft token that survives with probability a (all before it and itself accepted) adds a to what the step emits and
makes the step longer. With the tokens of all drafts sorted by survival, the best n of them maximise
(B + a_1 + ... + a_n) / (t(B, B + n) + overhead): a draft's tokens survive ever less likely, so that what is chosen of
each draft is its beginning (after the goodput rule of SmartSpec, arXiv 2406.14066, at the level of single tokens).
"""

import numpy as np
from numba import njit

from drafters.acceptance import bucket
from drafters.cost_model import verification_seconds

DRAFTED, NOTHING_KNOWN, DOES_NOT_PAY, NO_ROOM, SHORTENED = range(5)
REASONS = ("drafted", "nothing known", "does not pay", "no room", "shortened")
"""what became of a sequence in a step; `shortened` counts drafted ones again, whose draft was cut"""
_HYSTERESIS = 1.02
"""drafting must promise this much more than not drafting: a wrong promise costs, an even one gains nothing"""
_TRIAL = 0.7
"""what it must promise in a trial, which is made to learn what it costs"""


@njit(cache=True)
def allocate(
    chances: np.ndarray,
    matches: np.ndarray,
    confidences: np.ndarray,
    drafts: np.ndarray,
    budgets: np.ndarray,
    urgency: np.ndarray,
    table: np.ndarray,
    scale: float,
    overhead: float,
    price: float,
    trial: bool,
    reasons: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, int, float, float, float, float, float, float]:
    """Chooses among the drafts of D drafters for B rows.

    Args:
        chances: float64 [D, MATCHES, CONFIDENCES, DEPTHS], of acceptance.
        matches: int64 [D, B], -1: unknown.
        confidences: float32 [D, B, K], negative: unknown.
        drafts: int64 [D, B], tokens proposed.
        budgets: int64 [B].
        urgency: float64 [B], what a token of this row is worth, 1 being usual.
        table, scale: the cost model's.
        overhead: seconds of a step beside the verification, drafting included.
        trial: whether to draft even where it seems not to pay, unless it seems hopeless.
        price: least survival that was worth a token in the last step; chooses between drafters.
        reasons: int64 [REASONS], added to.

    Returns the choice, int64 [B]: drafter, -1 for none; lengths int64 [B], and their sum; the new price; expected
    tokens by their worth; expected seconds, and those of a verification without drafts; expected tokens and seconds of
    a verification of the chosen drafts in full length.
    """
    choice, survivals = _chosen(chances, matches, confidences, drafts, price)
    worth, owner = _slots(choice, survivals, drafts, urgency)
    rows, slots, total = len(choice), len(worth), float(urgency.sum())
    lengths = np.zeros(rows, np.int64)
    order = np.argsort(worth, kind="mergesort")
    count, gained, kept = 0, 0.0, 0.0
    plain = verification_seconds(table, scale, rows, rows)
    seconds = plain + overhead
    best_rate = total / seconds * (_TRIAL if trial else _HYSTERESIS)
    for n in range(1, slots + 1):
        gained -= worth[order[n - 1]]
        longer = verification_seconds(table, scale, rows, rows + n) + overhead
        if (total + gained) / longer > best_rate:
            best_rate, count, kept, seconds = (total + gained) / longer, n, gained, longer
    everything, longest = total + gained, verification_seconds(table, scale, rows, rows + slots)
    for n in range(count):
        lengths[owner[order[n]]] += 1
    _count_reasons(choice, lengths, drafts, budgets, reasons)
    # What the next token would cost, in tokens.
    longer = verification_seconds(table, scale, rows, rows + count + 1) + overhead
    price = min(max((longer - seconds) * (total + kept) / seconds, 0.0), 1.0)
    return choice, lengths, count, price, total + kept, seconds, plain, everything, longest


@njit(cache=True)
def promised(chances: np.ndarray, matches: np.ndarray, confidences: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Accepted tokens, float64 [B], that the drafts of one drafter promise.

    Args:
        chances: float64 [MATCHES, CONFIDENCES, DEPTHS], of acceptance.
        matches: int64 [B], -1: unknown.
        confidences: float32 [B, K], negative: unknown.
        lengths: int64 [B].
    """
    tokens = np.zeros(len(lengths))
    for b in range(len(lengths)):
        survival = 1.0
        for k in range(lengths[b]):
            m, c, d = bucket(matches[b], confidences[b, k], k)
            survival *= chances[m, c, d]
            tokens[b] += survival
    return tokens


@njit(cache=True)
def _chosen(
    chances: np.ndarray, matches: np.ndarray, confidences: np.ndarray, drafts: np.ndarray, price: float
) -> tuple[np.ndarray, np.ndarray]:
    """The drafter of each row, int64 [B], -1 for none, and the survival of its tokens, float64 [B, K]."""
    drafters, rows, width = confidences.shape
    choice, survivals, candidate = np.full(rows, -1, np.int64), np.zeros((rows, width)), np.zeros(width)
    for b in range(rows):
        best = 0.0
        for drafter in range(drafters):
            survival, value = 1.0, 0.0
            for k in range(drafts[drafter, b]):
                m, c, d = bucket(matches[drafter, b], confidences[drafter, b, k], k)
                survival *= chances[drafter, m, c, d]
                candidate[k] = survival
                # Below the price a token is worth a little still, so that a choice is made where nothing pays.
                value += max(survival - price, 0.01 * survival)
            if value > best:
                best, choice[b] = value, drafter
                survivals[b, : drafts[drafter, b]] = candidate[: drafts[drafter, b]]
    return choice, survivals


@njit(cache=True)
def _slots(
    choice: np.ndarray, survivals: np.ndarray, drafts: np.ndarray, urgency: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of all tokens of the chosen drafts, minus what they are worth, float64 [N], and their rows, int64 [N]."""
    slots = 0
    for b in range(len(choice)):
        if choice[b] >= 0:
            slots += drafts[choice[b], b]
    worth, owner, i = np.empty(slots), np.empty(slots, np.int64), 0
    for b in range(len(choice)):
        for k in range(drafts[choice[b], b] if choice[b] >= 0 else 0):
            worth[i], owner[i] = -survivals[b, k] * urgency[b], b
            i += 1
    return worth, owner


@njit(cache=True)
def _count_reasons(
    choice: np.ndarray, lengths: np.ndarray, drafts: np.ndarray, budgets: np.ndarray, reasons: np.ndarray
) -> None:
    for b in range(len(choice)):
        if lengths[b] > 0:
            reasons[DRAFTED] += 1
            reasons[SHORTENED] += lengths[b] < drafts[choice[b], b]
        elif budgets[b] == 0:
            reasons[NO_ROOM] += 1
        elif choice[b] < 0:
            reasons[NOTHING_KNOWN] += 1
        else:
            reasons[DOES_NOT_PAY] += 1
