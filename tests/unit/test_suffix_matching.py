"""The automaton against search in lists: lengths, counts, continuations, for one text and for many that interleave."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from drafters.suffix import matching
from drafters.suffix import states as k
from drafters.suffix.pool import AutomatonPool

texts = st.integers(1, 4).flatmap(lambda v: st.lists(st.integers(0, v - 1), max_size=30))
documents = st.lists(texts, min_size=1, max_size=4)


def ids(tokens):
    return np.array(tokens, np.int64)


def arrays(pool, number):
    return k.states_of(pool.heads[number]), k.slots_of(pool.heads[number])


def state_of(pool, number, text):
    """State of a string by following its tokens from the root; None where it does not occur."""
    state = 0
    for token in text:
        state = k.target_of(*arrays(pool, number), state, token)
        if state == 0:
            return None
    return state


def occurrences(docs, text):
    """(document, end) of every place where `text` occurs."""
    n = len(text)
    return [(d, e) for d, doc in enumerate(docs) for e in range(n, len(doc) + 1) if doc[e - n : e] == text]


def substrings(docs):
    return {tuple(doc[a:b]) for doc in docs for a in range(len(doc)) for b in range(a + 1, len(doc) + 1)}


def interleaved(docs, order, latest=False):
    """The documents, grown one token at a time in a given order, and the automaton after it."""
    pool = AutomatonPool(latest)
    number = pool.new()
    places, grown = [0] * len(docs), [[] for _ in docs]
    queue = list(order) + [d for d, doc in enumerate(docs) for _ in doc]
    for d in queue:
        d %= len(docs)
        if len(grown[d]) < len(docs[d]):
            token = docs[d][len(grown[d])]
            places[d] = pool.extend(number, ids([token]), places[d])
            grown[d].append(token)
            yield pool, number, grown, places


@settings(max_examples=60, deadline=None)
@given(documents, st.lists(st.integers(0, 3), max_size=60))
def test_documents_that_grow_in_turns_give_the_automaton_of_all_their_substrings(docs, order):
    last = None
    for pool, number, grown, places in interleaved(docs, order):
        for doc, place in zip(grown, places, strict=True):
            assert place == (state_of(pool, number, doc) or 0)
            assert arrays(pool, number)[0][place, k.LENGTH] == len(doc)
        last = pool, number, grown
    if last is None:
        return
    pool, number, grown = last
    states, _ = arrays(pool, number)
    known = substrings(grown)
    for text in known:
        state = state_of(pool, number, text)
        assert state is not None
        ends = occurrences(grown, list(text))
        assert states[state, k.COUNT] == len(ends)
        assert states[states[state, k.LINK], k.LENGTH] < len(text) <= states[state, k.LENGTH]
    alphabet = {token for text in known for token in text}
    for text in list(known)[:50]:
        for token in alphabet:
            longer = (*text, token)
            assert (state_of(pool, number, longer) is not None) == (longer in known)
    assert pool.heads[number, k.STATES] <= 2 * sum(map(len, grown))


@settings(max_examples=60, deadline=None)
@given(documents)
def test_counts_spread_afterwards_are_those_kept_on_the_way(docs):
    pool = AutomatonPool()
    online, offline = pool.new(), pool.new()
    for doc in docs:
        pool.extend(online, ids(doc))
        pool.extend(offline, ids(doc), counted=False)
    k.spread_counts(pool.heads[offline])
    for text in substrings(docs):
        a, b = state_of(pool, online, text), state_of(pool, offline, text)
        for column in (k.COUNT, k.LENGTH, k.DEGREE):
            assert arrays(pool, online)[0][a, column] == arrays(pool, offline)[0][b, column]
        # Equally frequent continuations may differ, their frequency may not.
        counts = [
            arrays(pool, n)[0][matching._best(*arrays(pool, n), s)[1], k.COUNT] for n, s in ((online, a), (offline, b))
        ]
        assert counts[0] == counts[1] or not arrays(pool, online)[0][a, k.TARGET]


def longest_suffix(docs, text):
    """The longest suffix of `text` that occurs in the documents."""
    for n in range(len(text), 0, -1):
        if occurrences(docs, text[len(text) - n :]):
            return n
    return 0


@settings(max_examples=60, deadline=None)
@given(documents, texts)
def test_a_followed_text_is_matched_as_far_back_as_it_occurs(docs, text):
    pool = AutomatonPool()
    number = pool.new()
    for doc in docs:
        pool.extend(number, ids(doc))
    place = length = 0
    for n, token in enumerate(text, 1):
        place, length = matching.transfer(*arrays(pool, number), place, length, token)
        assert length == longest_suffix(docs, text[:n])
        assert place == (state_of(pool, number, text[n - length : n]) or 0)


@settings(max_examples=60, deadline=None)
@given(documents, texts, texts)
def test_a_followed_text_keeps_its_place_while_the_automaton_grows(docs, text, new):
    pool = AutomatonPool()
    number = pool.new()
    for doc in docs:
        pool.extend(number, ids(doc))
    place = length = 0
    for token in text:
        place, length = matching.transfer(*arrays(pool, number), place, length, token)
    pool.extend(number, ids(new))
    states, _ = arrays(pool, number)
    assert matching._settle(states, place, length) == (state_of(pool, number, text[len(text) - length :]) or 0)


def longest_continued_suffix(docs, text):
    """Length of the longest suffix of `text` that is followed by something, and by what how often."""
    for n in range(len(text), 0, -1):
        ends = [(d, e) for d, e in occurrences(docs, text[len(text) - n :]) if e < len(docs[d])]
        if ends:
            return n, [docs[d][e] for d, e in ends]
    return 0, []


@settings(max_examples=80, deadline=None)
@given(documents, st.lists(st.integers(0, 3), max_size=60))
def test_the_draft_follows_the_longest_suffix_by_its_most_frequent_continuation(docs, order):
    for pool, number, grown, places in interleaved(docs, order):
        states, slots = arrays(pool, number)
        for doc, place in zip(grown, places, strict=True):
            state, length = matching.match(states, place, len(doc))
            expected, following = longest_continued_suffix(grown, doc)
            if _links(states, place) < matching.ANCESTORS:
                assert length == expected
            if not length:
                continue
            tokens, confidences = np.zeros(3, np.int64), np.zeros(3, np.float32)
            assert matching.draft(states, slots, state, 1, 0.0, tokens, confidences) == 1
            often = max(following.count(t) for t in following)
            assert following.count(tokens[0]) == often
            seen = len(occurrences(grown, doc[len(doc) - length :]))
            np.testing.assert_allclose(confidences[0], (often + 0.5) / (seen + 1), rtol=1e-6)
            count = matching.draft(states, slots, state, 3, 0.0, tokens, confidences)
            assert 1 <= count <= 3


def _links(states, state):
    steps = 0
    while state > 0:
        state, steps = states[state, k.LINK], steps + 1
    return steps


def test_the_latest_continuation_is_the_latest():
    for latest, expected in ((True, 9), (False, 8)):
        pool = AutomatonPool(latest)
        number = pool.new()
        place = pool.extend(number, ids([1, 2, 8, 1, 2, 8, 1, 2, 9, 1, 2]))
        states, slots = arrays(pool, number)
        state, length = matching.match(states, place, 11)
        tokens, confidences = np.zeros(1, np.int64), np.zeros(1, np.float32)
        assert length == 2
        matching.draft(states, slots, state, 1, 0.0, tokens, confidences)
        assert tokens[0] == expected


@settings(max_examples=40, deadline=None)
@given(documents, st.lists(st.integers(0, 3), max_size=60))
def test_the_latest_continuation_is_followed_where_that_is_asked_for(docs, order):
    said = {}
    for pool, number, grown, _places in interleaved(docs, order, latest=True):
        states, slots = arrays(pool, number)
        (doc,) = [d for d in grown if d != said.get(id(d), [])]
        for n in range(len(doc)):
            said[tuple(doc[n:-1])] = doc[-1]
        said[id(doc)] = list(doc)
        for text, token in said.items():
            if isinstance(text, tuple):
                assert matching._best(states, slots, state_of(pool, number, text) or 0)[0] == token


def test_a_short_match_gives_way_to_a_surer_shorter_one():
    pool = AutomatonPool()
    number = pool.new()
    for _ in range(9):
        pool.extend(number, ids([5, 2, 3]))
    pool.extend(number, ids([4, 2, 7]))
    states, slots = arrays(pool, number)
    assert matching._surest(states, slots, state_of(pool, number, [4, 2])) == state_of(pool, number, [2])
    pool.extend(number, ids([4, 2, 7]))
    for _ in range(20):
        pool.extend(number, ids([4, 2, 7]))
    states, slots = arrays(pool, number)
    assert matching._surest(states, slots, state_of(pool, number, [4, 2])) == state_of(pool, number, [4, 2])


def test_a_draft_ends_where_the_text_rarely_went_on_so():
    pool = AutomatonPool()
    number = pool.new()
    for ending in ([3, 4, 5], [3, 4, 6], [3, 7, 7], [8, 8, 8]):
        pool.extend(number, ids([1, 2, *ending]))
    states, slots = arrays(pool, number)
    state = state_of(pool, number, [1, 2])
    tokens, confidences = np.zeros(8, np.int64), np.zeros(8, np.float32)
    for least, count in ((0.8, 0), (0.7, 1), (0.45, 2), (0.2, 3)):
        assert matching.draft(states, slots, state, 8, least, tokens, confidences) == count
    np.testing.assert_allclose(confidences[:2], [3.5 / 5, 2.5 / 4])


def test_no_match_reaches_across_documents():
    pool = AutomatonPool()
    number = pool.new()
    for doc in ([1, 2, 3], [4, 5, 6]):
        pool.extend(number, ids(doc))
    assert state_of(pool, number, [3, 4]) is None
    states, slots = arrays(pool, number)
    tokens, confidences = np.zeros(9, np.int64), np.zeros(9, np.float32)
    count = matching.draft(states, slots, state_of(pool, number, [1, 2]), 9, 0.0, tokens, confidences)
    assert tokens[:count].tolist() == [3]


def test_a_repetition_goes_on_and_costs_no_more_than_other_text():
    pool = AutomatonPool()
    number = pool.new()
    place = pool.extend(number, ids([7] * 20_000))
    states, slots = arrays(pool, number)
    state, length = matching.match(states, place, 20_000)
    tokens, confidences = np.zeros(12, np.int64), np.zeros(12, np.float32)
    assert length == 19_999
    assert matching.draft(states, slots, state, 12, 0.0, tokens, confidences) == 12 and set(tokens.tolist()) == {7}
    place = pool.extend(number, ids([8]), place)  # a transition from every suffix at once: more than there was room for
    states, slots = arrays(pool, number)
    assert matching.match(states, place, 20_001) == (0, 0)
    for n in (1, 2, 19_999):
        assert k.target_of(states, slots, state_of(pool, number, [7] * n), 8) == place


def test_blocks_grow_shrink_back_to_nothing_and_numbers_come_again():
    pool = AutomatonPool()
    rng = np.random.default_rng(0)
    numbers = [pool.new(states=1 + i, slots=i) for i in range(20)]
    for number in numbers:
        pool.extend(number, rng.integers(0, 50, 2000))
    assert pool.bytes == sum(pool.size(number) for number in numbers)
    assert pool.tokens() == 20 * 2000
    assert 40 < pool.bytes / pool.tokens() < 200
    for number in numbers:
        pool.free(number)
    assert pool.bytes == 0 and pool.tokens() == 0
    assert {pool.new() for _ in range(20)} == set(numbers)
