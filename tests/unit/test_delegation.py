"""When an arbiter leaves its drafts as they are."""

import numpy as np

from drafters.acceptance import CONFIDENCES, DEPTHS, MATCHES
from drafters.delegation import Delegation, Lull, Outlook
from drafters.reach import Reach

PLAIN, GOOD, BAD = Outlook(1.0, 1.0), Outlook(3.0, 1.0), Outlook(2.0, 1.0)


def taken(delegation, rows=1, asked=(0,), asleep=()):
    """Steps until a decision is due."""
    return delegation.take(asked, rows, asleep)


def compared(delegation, decided, whole, drafter=0, rows=1, times=8, plain=PLAIN):
    return [delegation.compare((drafter,), rows, plain, decided, whole) for _ in range(times)]


def test_steps_without_decisions_become_more_while_they_promise_more():
    delegation, windows = Delegation(), []
    for times in (8, 2, 2, 2, 2, 2):
        assert all(compared(delegation, BAD, GOOD, times=times - 1)) and taken(delegation) == 0
        assert all(compared(delegation, BAD, GOOD, times=1))
        windows.append(taken(delegation))
    assert windows == [8, 16, 32, 64, 128, 128]
    assert not compared(delegation, Outlook(99.0, 1.0), GOOD, times=1)[0]
    while not compared(delegation, BAD, GOOD, times=1)[0]:
        pass
    assert taken(delegation) == 8


def test_decisions_that_bring_as_much_are_made():
    delegation = Delegation()
    assert not any(compared(delegation, GOOD, BAD) + compared(delegation, GOOD, GOOD, drafter=1))
    assert not any(compared(delegation, BAD, GOOD, drafter=2, plain=Outlook(3.1, 1.0)))  # nor where neither pays
    assert taken(delegation) == taken(delegation, asked=(1,)) == taken(delegation, asked=(2,)) == 0


def test_a_few_decisions_are_compared_first_and_means_decide():
    delegation = Delegation()
    compared(delegation, BAD, GOOD, times=7)
    assert taken(delegation) == 0
    compared(delegation, BAD, GOOD, times=1)
    assert taken(delegation) == 8
    # One large gain of a decision outweighs a few losses.
    assert compared(delegation, Outlook(10, 1), GOOD, drafter=1, times=3)[-1] is False
    assert compared(delegation, BAD, GOOD, drafter=1, times=2)[-1] is False


def test_other_batches_and_drafters_need_decisions_but_one_that_is_asked_once_more_does_not_end_it():
    delegation = Delegation()
    compared(delegation, BAD, GOOD)
    assert taken(delegation, asleep=[2, 7]) == 3
    assert taken(delegation, asked=(0, 1)) == 0
    assert taken(delegation) == 5
    delegation.give_back(2)
    assert taken(delegation, asked=(1, 0, 2)) == 0 and taken(delegation) == 2
    compared(delegation, BAD, GOOD)
    assert taken(delegation, rows=2) == 0 and taken(delegation) == 0
    compared(delegation, BAD, GOOD, rows=2)
    assert taken(delegation, asked=(1,), rows=2) == 0
    compared(delegation, BAD, GOOD)
    delegation.stop()
    assert taken(delegation) == 0


def test_a_lull_ends_with_its_steps_or_another_number_of_sequences():
    lull = Lull()
    assert not lull.goes_on(1) and lull.end() == 0
    lull.begin((2,), 4, 3)
    assert (lull.delegates, lull.rests) == ((2,), False)
    assert [lull.goes_on(4) for _ in range(4)] == [True, True, True, False]
    assert lull.end() == 3 and lull.delegates == () and not lull.rests
    lull.begin((), 4, 3)
    assert lull.rests and lull.goes_on(4) and not lull.goes_on(3)
    assert lull.end() == 1 and not lull.goes_on(4) and not lull.rests


def test_a_drafter_that_never_drafts_longer_is_not_taken_to():
    """But it is asked for a token more by turns, and may do so later."""
    counts, reach = np.zeros((MATCHES, CONFIDENCES, DEPTHS, 2)), Reach()
    counts[..., :] = 99, 100

    def chosen(longest):
        for _ in range(64):
            reach.was_asked(min(reach.next, longest), 0.01)
            if reach.due:
                reach.choose(counts, 1, lambda rows, tokens: 1.0, 0.0)
        return reach.tokens

    assert chosen(3) == 3 and chosen(5) == 5


def test_whole_drafts_that_bring_less_than_they_promise_are_not_delegated_for_a_while():
    delegation = Delegation()
    compared(delegation, BAD, GOOD)
    assert taken(delegation) == 8
    for _ in range(7):
        delegation.learn(GOOD, Outlook(3.0, 6.0))
    assert delegation.bias == 1, "too few to tell"
    delegation.learn(GOOD, Outlook(3.0, 6.0))
    assert abs(delegation.bias - 1 / 6) < 1e-9
    found = compared(delegation, BAD, GOOD, times=60)
    assert not any(found[:8]) and all(found[-2:]), "promises are believed again some day"
    delegation.learn(GOOD, Outlook(3.0, 6.0))
    assert not any(compared(delegation, BAD, GOOD, times=2))
    delegation.stop()
    assert delegation.bias == 1
