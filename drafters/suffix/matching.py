"""The suffix automaton's compiled core: the longest match of what was emitted, and its continuation, for many automata
in one call."""

import numpy as np
from numba import njit

from drafters.suffix.states import (
    BEST,
    COUNT,
    LABEL,
    LEADS_TO,
    LENGTH,
    LINK,
    TARGET,
    TOKEN,
    append,
    has_room,
    mark,
    slots_of,
    states_of,
    target_of,
)

ANCESTORS = 8
"""suffixes tried for one that has a continuation"""
SHORT, SUFFIXES = 6, 4
"""a match of up to SHORT tokens is weighed against the next shorter ones, SUFFIXES in all; a longer one is trusted"""


# ---- following -------------------------------------------------------------------------------------------------------


@njit(cache=True)
def _settle(states: np.ndarray, state: int, length: int) -> int:
    """The state of a matched string of `length` after others have split states: its strings are longer than its
    link's."""
    while state != 0 and length <= states[states[state, LINK], LENGTH]:
        state = states[state, LINK]
    return state


@njit(cache=True)
def transfer(states: np.ndarray, slots: np.ndarray, state: int, length: int, token: int) -> tuple[int, int]:
    """The longest suffix of (matched string + token) in the automaton: its state and length."""
    state = _settle(states, state, length)
    while True:
        target = target_of(states, slots, state, token)
        if target != 0:
            return target, length + 1
        if state == 0:
            return 0, 0
        state = states[state, LINK]
        length = states[state, LENGTH]


@njit(cache=True)
def observe(
    heads: np.ndarray,
    automata: np.ndarray,
    places: np.ndarray,
    lengths: np.ndarray,
    own: np.ndarray,
    rows: np.ndarray,
    tokens: np.ndarray,
    borders: np.ndarray,
    done: np.ndarray,
    latest: bool,
) -> int:
    """Tokens that continue sequences, in every automaton they are followed in.

    Args:
        heads: int64 [A, HEADER_WIDTH].
        automata: int64 [S, T], automaton of each track of each sequence; -1 for none.
        places: int64 [S, T], where the sequence stands in it; changed.
        lengths: int64 [S, T], tokens matched there; changed.
        own: bool [T], tracks whose automaton the sequence's text becomes part of; the others are only followed.
        rows: int64 [B], sequences.
        tokens: int64 [N], those of row b at `borders[b]:borders[b + 1]`.
        borders: int64 [B + 1].
        done: int64 [B, T], tokens taken in so far; changed.
        latest: whether the best transition is the latest one.

    Returns the automaton that must grow before the call can be repeated; -1 when all is done.
    """
    for b in range(len(rows)):
        row = rows[b]
        for track in range(automata.shape[1]):
            automaton = automata[row, track]
            if automaton < 0:
                continue
            head = heads[automaton]
            states, slots = states_of(head), slots_of(head)
            place, length = places[row, track], lengths[row, track]
            for i in range(borders[b] + done[b, track], borders[b + 1]):
                if own[track]:
                    if not has_room(head, states, slots, place, tokens[i]):
                        places[row, track], lengths[row, track] = place, length
                        return automaton
                    last = place
                    place = append(head, states, slots, place, tokens[i], True)
                    length += 1
                    mark(states, slots, last, place, tokens[i], latest)
                else:
                    place, length = transfer(states, slots, place, length, tokens[i])
                done[b, track] += 1
            places[row, track], lengths[row, track] = place, length
    return -1


# ---- drafting --------------------------------------------------------------------------------------------------------


@njit(cache=True)
def _continued(states: np.ndarray, state: int) -> int:
    """The longest suffix of the state's strings that has a continuation; 0 where there is none within reach."""
    for _ in range(ANCESTORS):
        if state <= 0 or states[state, TARGET] != 0:
            return max(state, 0)
        state = states[state, LINK]
    return 0


@njit(cache=True)
def _best(states: np.ndarray, slots: np.ndarray, state: int) -> tuple[int, int]:
    """Token and target of the best transition."""
    place = states[state, BEST]
    if place == 0:
        return states[state, TOKEN], states[state, TARGET]
    return slots[place - 1, LABEL], slots[place - 1, LEADS_TO]


@njit(cache=True)
def _confidence(states: np.ndarray, state: int, target: int) -> float:
    """How often the transition was taken from here, shrunk towards one half: (c + 1/2)/(n + 1)."""
    return (min(states[target, COUNT], states[state, COUNT]) + 0.5) / (states[state, COUNT] + 1.0)


@njit(cache=True)
def _surest(states: np.ndarray, slots: np.ndarray, state: int) -> int:
    """Of the state and the next shorter suffixes, the one whose best transition is the surest; the longest of equals.

    A short match seen once says less than a shorter one seen a hundred times.
    """
    surest, most = state, -1.0
    for _ in range(SUFFIXES):
        if state <= 0:
            break
        target = _best(states, slots, state)[1]
        if target != 0:
            confidence = _confidence(states, state, target)
            if confidence > most:
                surest, most = state, confidence
        state = states[state, LINK]
    return surest


@njit(cache=True)
def match(states: np.ndarray, state: int, length: int) -> tuple[int, int]:
    """State and length of the longest suffix with a continuation, of a sequence that stands at `state`."""
    state = _settle(states, state, length)
    found = _continued(states, state)
    return found, (length if found == state else states[found, LENGTH])


@njit(cache=True)
def draft(
    states: np.ndarray,
    slots: np.ndarray,
    state: int,
    count: int,
    least: float,
    tokens: np.ndarray,
    confidences: np.ndarray,
) -> int:
    """Up to `count` tokens from a state with a continuation on, into `tokens`; returns how many.

    `confidences` are as `_confidence` says. The draft ends where the product of c/n falls below `least`. Where a text
    ends (a sibling's newest token, say) it goes on from that text's longest suffix that was continued: a repetition
    goes on as it began.
    """
    survival = 1.0
    for k in range(count):
        state = _continued(states, state)
        if state == 0:
            return k
        token, target = _best(states, slots, state)
        survival *= min(1.0, states[target, COUNT] / max(states[state, COUNT], 1))
        if survival < least:
            return k
        tokens[k] = token
        confidences[k] = _confidence(states, state, target)
        state = target
    return count


@njit(cache=True)
def propose(
    heads: np.ndarray,
    automata: np.ndarray,
    places: np.ndarray,
    lengths: np.ndarray,
    rows: np.ndarray,
    budgets: np.ndarray,
    biases: np.ndarray,
    threshold: int,
    base: float,
    factor: float,
    least: float,
    most: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Drafts for B rows from the track whose match, less its bias, is longest; the first track among equals.

    Args:
        heads, automata, places, lengths, rows: as for `observe`.
        budgets: int64 [B].
        biases: int64 [T].
        threshold: shortest match, bias taken off, that is drafted from.
        base, factor: a match of m tokens gives a draft of `base + factor * m`.
        least: where the draft's relative frequency falls below, it ends.
        most: longest draft.

    Returns tokens int64 [B, K], how many of each row are drafted, int64 [B], tokens of context that the draft rests
    on, int64 [B], and confidences float32 [B, K].
    """
    width = 0
    for b in range(len(rows)):
        width = max(width, min(budgets[b], most))
    tokens, confidences = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.float32)
    counts, matches = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    for b in range(len(rows)):
        row, best, best_track, best_state = rows[b], threshold - 1, -1, 0
        for track in range(automata.shape[1]):
            if automata[row, track] < 0:
                continue
            states = states_of(heads[automata[row, track]])
            state, length = match(states, places[row, track], lengths[row, track])
            if state != 0 and length - biases[track] > best:
                best, best_track, best_state = length - biases[track], track, state
                matches[b] = length
        if best_track < 0:
            continue
        states, slots = states_of(heads[automata[row, best_track]]), slots_of(heads[automata[row, best_track]])
        wanted = min(budgets[b], np.int64(min(base + factor * matches[b], width)))
        if matches[b] <= SHORT:
            surest = _surest(states, slots, best_state)
            if surest != best_state:
                best_state, matches[b] = surest, states[surest, LENGTH]
        counts[b] = draft(states, slots, best_state, wanted, least, tokens[b], confidences[b])
    return tokens, counts, matches, confidences
