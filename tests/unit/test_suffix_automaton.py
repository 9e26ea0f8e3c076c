import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from drafters.base import Drafter, DraftRequest, SequenceStart, Verified
from drafters.suffix_automaton import SuffixAutomaton, SuffixAutomatonDrafter

texts = st.integers(1, 4).flatmap(lambda v: st.lists(st.integers(0, v - 1), max_size=30))


def longest_earlier_suffix(text):
    """Length of the longest suffix that also ends before the text's end, and where it last did, by search."""
    for length in range(len(text) - 1, 0, -1):
        suffix = text[len(text) - length :]
        for end in range(len(text) - 1, length - 1, -1):
            if text[end - length : end] == suffix:
                return length, end
    return 0, 0


@given(texts)
def test_match_is_the_longest_earlier_suffix_at_its_latest_place_after_every_token(text):
    automaton = SuffixAutomaton()
    for n, token in enumerate(text, 1):
        automaton.extend([token])
        length, end = longest_earlier_suffix(text[:n])
        assert automaton.match_length == length
        if length:
            assert automaton.match_end == end


@given(texts.filter(lambda t: len(t) > 1), st.integers(1, 40))
def test_draft_is_what_followed_the_match(text, count):
    automaton = SuffixAutomaton()
    automaton.extend(text)
    if automaton.match_length == 0:
        return
    draft = automaton.continuation(count)
    assert len(draft) == count
    continued = text + draft
    assert draft == continued[automaton.match_end : automaton.match_end + count]


@given(texts, texts, texts)
def test_a_copy_grows_on_its_own(prompt, one, other):
    shared = SuffixAutomaton()
    shared.extend(prompt)
    copies = [shared.copy(), shared.copy()]
    for copy, ending in zip(copies, (one, other), strict=True):
        copy.extend(ending)
    for copy, ending in zip(copies, (one, other), strict=True):
        alone = SuffixAutomaton()
        alone.extend(prompt + ending)
        assert (copy.match_length, copy.match_end) == (alone.match_length, alone.match_end)


def test_long_repetition_stays_cheap_and_true():
    automaton = SuffixAutomaton()
    automaton.extend([7] * 5000)
    assert automaton.match_length == 4999
    assert automaton.continuation(3) == [7, 7, 7]
    automaton.extend([8])
    assert automaton.match_length == 0


def start(id, prompt, group=0):
    return SequenceStart(id, np.array(prompt, np.int64), group, 1.0, 0)


def request(ids, budgets):
    return DraftRequest(ids, np.array(budgets), np.ones(len(ids), np.float32))


def drafts(drafter, ids, budgets):
    proposal = drafter.propose(request(ids, budgets))
    assert proposal.probabilities is None
    return [row[:n].tolist() for row, n in zip(proposal.token_ids, proposal.lengths, strict=True)]


def drafter(**options):
    return SuffixAutomatonDrafter(SuffixAutomatonDrafter.Options(**options))


def test_draft_grows_with_the_match_within_budget_and_limits():
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]
    assert isinstance(drafter(), Drafter)
    for options, budget, expected in (
        ({"base": 1.0, "factor": 1.0}, 10, [4, 5, 6, 7]),
        ({"base": 0.0, "factor": 1.0}, 10, [4, 5, 6]),
        ({"base": 0.5, "factor": 0.5}, 10, [4, 5]),
        ({"base": 9.0, "factor": 1.0, "max_tokens": 5}, 10, [4, 5, 6, 7, 8]),
        ({"base": 9.0}, 2, [4, 5]),
        ({"base": 9.0}, 0, []),
        ({"min_match": 4}, 10, []),
    ):
        d = drafter(**options)
        d.begin([start(1, prompt)])
        assert drafts(d, [1], [budget]) == [expected], options


def test_members_of_a_group_part_ways():
    d = drafter(base=2.0, factor=0.0)
    d.begin([start(1, [1, 2, 3, 4, 5, 6]), start(2, [1, 2, 3, 4, 5, 6])])
    emitted = [np.array([9, 2]), np.array([9, 4])]
    d.observe(Verified([1, 2], emitted, np.zeros(2, np.int64)))
    assert drafts(d, [2, 1], [5, 5]) == [[5, 6], [3, 4]]
    d.begin([start(3, [1, 2, 3, 4, 5, 6])])
    d.observe(Verified([3], [np.array([1])], np.zeros(1, np.int64)))
    assert drafts(d, [3], [5]) == [[2, 3]]


def test_ending_forgets_sequences_and_their_prompt():
    d = drafter()
    d.begin([start(1, [1, 2, 1], group=4), start(2, [1, 2, 1], group=4), start(3, [5, 5], group=5)])
    d.end([1])
    assert drafts(d, [2, 3], [1, 1]) == [[2], [5]]
    d.end([2, 3, 99])
    assert not (d._sequences or d._groups or d._prompts)
