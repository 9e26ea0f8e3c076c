"""The suffix automaton's compiled core: its states and transitions, and how text is appended.

A state is a row of eight int32, a transition beyond a state's first is a row of four in an open-addressing table with
linear probing. Most states have one transition, so the table holds few and most lookups touch one cache line. State 0
is the empty string; no transition leads to it, so target 0 means "none".

Construction after Blumer et al. (1985), for many documents that grow at the same time: a document's text is always the
longest string of its state (no longer string ends where the document began), so its place in the automaton stays put
while others grow, and extending it continues there.

`COUNT` of a state is how often its strings occur, `BEST` its most frequent transition (the latest among equals), or
its latest where that is asked for. An appended token changes both on the chain of suffix links; the walk is cut after
`WALK` states, because a text of one token repeated has a state for each suffix.
"""

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

LINK, LENGTH, COUNT, BEST, TOKEN, TARGET, MORE, DEGREE = range(8)
"""columns of a state; TOKEN and TARGET are its first transition, MORE the first further one's slot + 1, BEST the best
one's slot + 1 (0: the first transition), DEGREE how many there are"""
OWNER, LABEL, LEADS_TO, NEXT = range(4)
"""columns of a slot: state + 1 (0: free), token, target, next slot of the same state + 1"""
STATES_AT, SLOTS_AT, STATES, STATE_ROOM, SLOTS, SLOT_ROOM, CLOCK, WIDEST = range(8)
"""columns of an automaton's header: addresses, states in use and allocated, slots in use and allocated (a power of
two), tokens appended, largest DEGREE beside the root's"""
STATE_WIDTH, SLOT_WIDTH, HEADER_WIDTH = 8, 4, 8

WALK = 32


@intrinsic
def _int32_at(typing_context: Any, address: Any) -> Any:
    """A pointer from an address; the array it points to is kept alive by the pool."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int32)(types.int64), generate


@njit(cache=True)
def states_of(head: np.ndarray) -> np.ndarray:
    return carray(_int32_at(head[STATES_AT]), (head[STATE_ROOM], STATE_WIDTH))


@njit(cache=True)
def slots_of(head: np.ndarray) -> np.ndarray:
    return carray(_int32_at(head[SLOTS_AT]), (head[SLOT_ROOM], SLOT_WIDTH))


# ---- transitions -----------------------------------------------------------------------------------------------------


@njit(cache=True)
def _find(slots: np.ndarray, state: int, token: int) -> Any:
    """The transition's slot, or -1 - the free slot where it belongs."""
    mask = np.uint64(len(slots) - 1)
    mixed = (np.uint64(state) << np.uint64(32) | np.uint64(token)) * np.uint64(0x9E3779B97F4A7C15)
    place = (mixed >> np.uint64(32)) & mask
    while True:
        owner = slots[place, OWNER]
        if owner == 0:
            return -1 - np.int64(place)
        if owner == state + 1 and slots[place, LABEL] == token:
            return np.int64(place)
        place = (place + np.uint64(1)) & mask


@njit(cache=True)
def target_of(states: np.ndarray, slots: np.ndarray, state: int, token: int) -> int:
    """Where `token` leads from `state`; 0 for nowhere."""
    if states[state, TOKEN] == token:
        return states[state, TARGET]
    if states[state, MORE] == 0:
        return 0
    place = _find(slots, state, token)
    return slots[place, LEADS_TO] if place >= 0 else 0


@njit(cache=True)
def _add_transition(head: np.ndarray, states: np.ndarray, slots: np.ndarray, state: int, token: int, to: int) -> None:
    """A transition that is not there yet."""
    states[state, DEGREE] += 1
    if states[state, TARGET] == 0:
        states[state, TOKEN], states[state, TARGET] = token, to
        return
    place = -1 - _find(slots, state, token)
    slots[place, OWNER], slots[place, LABEL], slots[place, LEADS_TO] = state + 1, token, to
    slots[place, NEXT] = states[state, MORE]
    states[state, MORE] = place + 1
    head[SLOTS] += 1
    if state != 0 and states[state, DEGREE] > head[WIDEST]:
        head[WIDEST] = states[state, DEGREE]


@njit(cache=True)
def _redirect(states: np.ndarray, slots: np.ndarray, state: int, token: int, to: int) -> None:
    if states[state, TOKEN] == token:
        states[state, TARGET] = to
    else:
        slots[_find(slots, state, token), LEADS_TO] = to


# ---- appending -------------------------------------------------------------------------------------------------------


@njit(cache=True)
def _new_state(head: np.ndarray, states: np.ndarray, length: int, link: int) -> int:
    state = head[STATES]
    head[STATES] += 1
    states[state, LINK], states[state, LENGTH], states[state, COUNT], states[state, BEST] = link, length, 0, 0
    states[state, TOKEN], states[state, TARGET], states[state, MORE], states[state, DEGREE] = -1, 0, 0, 0
    return state


@njit(cache=True)
def _split(
    head: np.ndarray, states: np.ndarray, slots: np.ndarray, whole: int, state: int, token: int, counted: bool
) -> int:
    """A state for the strings of `whole` that now also end elsewhere: those up to `state`'s longest and `token`."""
    part = _new_state(head, states, states[state, LENGTH] + 1, states[whole, LINK])
    if counted:
        states[part, COUNT] = states[whole, COUNT]
    if states[whole, TARGET] != 0:
        _add_transition(head, states, slots, part, states[whole, TOKEN], states[whole, TARGET])
        place = states[whole, MORE]
        while place != 0:
            _add_transition(head, states, slots, part, slots[place - 1, LABEL], slots[place - 1, LEADS_TO])
            if states[whole, BEST] == place:
                states[part, BEST] = states[part, MORE]
            place = slots[place - 1, NEXT]
    while state != -1 and target_of(states, slots, state, token) == whole:
        _redirect(states, slots, state, token, part)
        state = states[state, LINK]
    states[whole, LINK] = part
    return part


@njit(cache=True)
def has_room(head: np.ndarray, states: np.ndarray, slots: np.ndarray, last: int, token: int) -> bool:
    """Whether appending `token` after `last` fits: checked before anything changes, so that it can be tried again."""
    if head[STATES] + 2 > head[STATE_ROOM]:
        return False
    free = head[SLOT_ROOM] - head[SLOT_ROOM] // 4 - head[SLOTS]
    if free > states[last, LENGTH] + head[WIDEST] + 2:
        return True
    needed, state = 0, last
    while state != -1:
        target = target_of(states, slots, state, token)
        if target != 0:
            needed += states[target, DEGREE]
            break
        needed += states[state, TARGET] != 0
        state = states[state, LINK]
    return free >= needed


@njit(cache=True)
def append(head: np.ndarray, states: np.ndarray, slots: np.ndarray, last: int, token: int, counted: bool) -> int:
    """The state of the document that stood at `last`, one token longer, counted with all its suffixes or alone."""
    head[CLOCK] += 1
    target = target_of(states, slots, last, token)
    if target != 0:  # another document went this way
        if states[target, LENGTH] == states[last, LENGTH] + 1:
            return target
        return _split(head, states, slots, target, last, token, counted)
    current = _new_state(head, states, states[last, LENGTH] + 1, 0)
    state = last
    while state != -1:
        target = target_of(states, slots, state, token)
        if target != 0:
            break
        _add_transition(head, states, slots, state, token, current)
        state = states[state, LINK]
    if state != -1:
        if states[target, LENGTH] != states[state, LENGTH] + 1:
            target = _split(head, states, slots, target, state, token, counted)
        states[current, LINK] = target
    return current


@njit(cache=True)
def mark(states: np.ndarray, slots: np.ndarray, last: int, state: int, token: int, latest: bool) -> None:
    """Every suffix of the text, which stood at `last` and now stands at `state`, has occurred once more."""
    for _ in range(WALK):
        if state <= 0:
            break
        states[state, COUNT] += 1
        state = states[state, LINK]
    for _ in range(WALK):
        if last < 0:
            break
        _prefer(states, slots, last, token, latest)
        last = states[last, LINK]


@njit(cache=True)
def _prefer(states: np.ndarray, slots: np.ndarray, state: int, token: int, latest: bool) -> None:
    """The transition that was just taken is the best one if no other has been taken more often."""
    place = 0 if states[state, TOKEN] == token else _find(slots, state, token) + 1
    best = states[state, BEST]
    if place == best:
        return
    new = states[state, TARGET] if place == 0 else slots[place - 1, LEADS_TO]
    old = states[state, TARGET] if best == 0 else slots[best - 1, LEADS_TO]
    if latest or states[new, COUNT] >= states[old, COUNT]:
        states[state, BEST] = place


@njit(cache=True)
def extend(head: np.ndarray, tokens: np.ndarray, start: int, last: int, counted: bool, latest: bool) -> tuple[int, int]:
    """Appends `tokens[start:]` to the document that stands at `last`; not `counted`: `spread_counts` does it later.

    Returns how many tokens of `tokens` are in, fewer than all where the automaton must grow first, and the document's
    new place.
    """
    states, slots = states_of(head), slots_of(head)
    for i in range(start, len(tokens)):
        if not has_room(head, states, slots, last, tokens[i]):
            return i, last
        state = append(head, states, slots, last, tokens[i], counted)
        if counted:
            mark(states, slots, last, state, tokens[i], latest)
        else:
            states[state, COUNT] += 1
        last = state
    return len(tokens), last


@njit(cache=True)
def spread_counts(head: np.ndarray) -> None:
    """Counts of a whole automaton from those of the ends alone: longer states give theirs to the suffixes they link to.
    Then the best transitions."""
    states, slots, n = states_of(head), slots_of(head), head[STATES]
    longest = 0
    for state in range(n):
        longest = max(longest, states[state, LENGTH])
    begins = np.zeros(longest + 2, np.int64)
    for state in range(n):
        begins[states[state, LENGTH] + 1] += 1
    begins = np.cumsum(begins)
    order = np.empty(n, np.int32)
    for state in range(n):
        order[begins[states[state, LENGTH]]] = state
        begins[states[state, LENGTH]] += 1
    for i in range(n - 1, 0, -1):
        link = states[order[i], LINK]
        states[link, COUNT] += states[order[i], COUNT]
    for state in range(n):
        place, best = states[state, MORE], states[states[state, TARGET], COUNT]
        while place != 0:
            count = states[slots[place - 1, LEADS_TO], COUNT]
            if count > best:
                best, states[state, BEST] = count, place
            place = slots[place - 1, NEXT]


@njit(cache=True)
def rehash(head: np.ndarray, old: np.ndarray, new: np.ndarray) -> None:
    """Moves all transitions into a larger, empty table; the order of a state's transitions stays."""
    states = states_of(head)
    for state in range(head[STATES]):
        place, before, best = states[state, MORE], -1, states[state, BEST]
        while place != 0:
            token, to, following = old[place - 1, LABEL], old[place - 1, LEADS_TO], old[place - 1, NEXT]
            spot = -1 - _find(new, state, token)
            new[spot, OWNER], new[spot, LABEL], new[spot, LEADS_TO], new[spot, NEXT] = state + 1, token, to, 0
            if place == best:
                states[state, BEST] = spot + 1
            if before < 0:
                states[state, MORE] = spot + 1
            else:
                new[before, NEXT] = spot + 1
            before, place = spot, following
