"""What drafters keep their sequences in, and what an arbiter keeps of its drafters."""

import math
import weakref

import numpy as np
import pytest
import torch

from drafters.acceptance import CONFIDENCES, DEPTHS, MATCHES
from drafters.arbiter import ArbiterDrafter
from drafters.base import BaseDrafter, DraftRequest, Needs, Proposal, SequenceStart, Verified
from drafters.cost_model import CostModel
from drafters.delegation import Outlook
from drafters.late import Backlog, merged
from drafters.plain_steps import PlainSteps
from drafters.slots import Slots, with_room
from drafters.stack import Stack
from drafters.standing import DEAR, Standing, Standings
from drafters.token_recycling import TokenRecyclingDrafter, likeliest
from drafters.urgency import GroupProgress

# ---- slots ----------------------------------------------------------------------------------------------------------


def test_slots_are_used_again_and_a_batch_is_never_answered_with_an_old_ones():
    slots = Slots()
    assert [slots.take(i) for i in (7, 8, 9)] == [0, 1, 2] and slots.of([9, 7]).tolist() == [2, 0]
    assert slots.free(7) == 0 and slots.free(7) is None and 7 not in slots
    assert slots.take(10) == 0 and slots.room == 3
    assert slots.of([9, 10]).tolist() == [2, 0]
    slots.free(9)
    slots.take(11), slots.take(9)
    assert slots.of([9, 10]).tolist() == [3, 0]
    assert slots.of([]).tolist() == []
    with pytest.raises(KeyError):
        slots.of([7])


def test_arrays_get_room_and_keep_what_they_hold():
    values = with_room(np.array([[1, 2]]), 3, -1)
    assert len(values) >= 3 and values[0].tolist() == [1, 2] and (values[1:] == -1).all()
    assert with_room(values, 2) is values


# ---- observing late -------------------------------------------------------------------------------------------------


class Noting(BaseDrafter):
    """Keeps what it was told."""

    def __init__(self, needs=Needs.NOTHING):
        self.needs, self.told = needs, []

    def observe(self, verified):
        self.told.append({i: tokens.tolist() for i, tokens in zip(verified.ids, verified.emitted, strict=True)})


def verified(emitted, accepted=0):
    return Verified(
        list(emitted), [np.array(t) for t in emitted.values()], np.full(len(emitted), accepted), seconds=1.0
    )


def test_a_sleeper_is_told_all_at_once_in_order():
    backlog = Backlog(1)
    backlog.add(verified({1: [3], 2: [4, 5]}))
    backlog.add(verified({2: [6], 3: [7]}))
    told = merged(backlog.take(0))
    assert {i: t.tolist() for i, t in zip(told.ids, told.emitted, strict=True)} == {1: [3], 2: [4, 5, 6], 3: [7]}
    both = merged([verified({1: [3]}, 1), verified({1: [4]}, 2)])
    assert both.accepted.tolist() == [3] and both.seconds == 2.0


@pytest.mark.parametrize("longest", [1, 3])
def test_many_steps_together_are_what_each_was(longest):
    """Also where every step emitted one token of each sequence, which goes a shorter way."""
    generator = np.random.default_rng(0)
    steps = [
        verified({i: generator.integers(0, 9, generator.integers(1, longest + 1)).tolist() for i in (4, 2, 7)}, n % 2)
        for n in range(5)
    ]
    told = merged(steps)
    assert list(told.ids) == [4, 2, 7] and told.seconds == 5.0 and told.accepted.tolist() == [2, 2, 2]
    for row, tokens in enumerate(told.emitted):
        assert tokens.tolist() == np.concatenate([step.emitted[row] for step in steps]).tolist()


def test_what_waits_holds_no_logits():
    backlog, logits = Backlog(1), torch.zeros(1, 10)
    gone = weakref.ref(logits)
    backlog.add(Verified([1], [np.array([3])], np.zeros(1, np.int64), None, logits, np.array([0])))
    del logits
    assert gone() is None


@pytest.mark.parametrize("needs", [Needs.NOTHING, Needs.LAYER_STATES | Needs.LOGITS])
def test_an_arbiter_keeps_sleepers_waiting_unless_they_read_the_layers_of_every_token(needs: Needs):
    drafter = Noting(needs)
    arbiter = ArbiterDrafter(ArbiterDrafter.Options(measure=False), drafters=[drafter])
    arbiter.begin([SequenceStart(1, np.array([5]), 0, 1.0, 0)])
    arbiter._standings_by_size[0].of(1)._wakes = 4
    for step, tokens in enumerate(([3], [4], [6])):
        proposal = arbiter.propose(DraftRequest([1], np.array([4]), np.ones(1, np.float32)))
        assert not proposal.lengths.any()
        arbiter.observe(verified({1: tokens}))
        if step == 0:
            assert drafter.told == ([] if needs == Needs.NOTHING else [{1: [3]}])
    arbiter.end([1])
    together = [{1: [3, 4, 6]}] if needs == Needs.NOTHING else [{1: [3]}, {1: [4]}, {1: [6]}]
    assert drafter.told == together


def test_steps_in_which_all_sleep_teach_what_not_drafting_takes():
    arbiter = ArbiterDrafter(drafters=[Noting()], costs=CostModel())
    arbiter.begin([SequenceStart(1, np.array([5]), 0, 1.0, 0)])
    for _ in range(4):  # that a decision to draft rests on
        arbiter.propose(DraftRequest([1], np.array([4]), np.ones(1, np.float32)))
        arbiter.observe(verified({1: [3]}))
    arbiter._standings_by_size[0].of(1)._wakes = 40
    known = arbiter.costs.plain_steps(1)
    for _ in range(43):
        arbiter.propose(DraftRequest([1], np.array([4]), np.ones(1, np.float32)))
        arbiter.observe(Verified([1], [np.array([3])], np.zeros(1, np.int64), seconds=0.25))
    arbiter.propose(DraftRequest([1], np.array([4]), np.ones(1, np.float32)))
    assert arbiter.costs.plain_steps(1) >= known + 38
    assert arbiter.costs.seconds(1, 1) == pytest.approx(0.25, rel=0.05)


def test_steps_without_drafts_teach_once_the_caches_are_theirs():
    costs = CostModel.of(lambda rows, tokens: 1.0, learns=True)
    steps = PlainSteps(costs)
    costs._met[:] = 20
    made = []
    for _ in range(2000):
        due = steps.due(1)
        made.append(due)
        steps.count(not due, 1.0)
        if due:
            steps.keep(1, 5.0 if not steps.settled else 1.0)
    steps.teach()
    drafted = [len(piece) for piece in "".join("-d"[due] for due in made).split("ddd")]
    assert drafted[:5] == [32, 64, 128, 256, 256] and sum(drafted) + 3 * (len(drafted) - 1) == 2000
    assert costs.seconds(1, 1) == pytest.approx(1.0)


def test_token_recycling_follows_without_logits_and_learns_with_them():
    drafter = TokenRecyclingDrafter()
    drafter.begin([SequenceStart(5, np.array([1]), 0, 1.0, 0), SequenceStart(6, np.array([2]), 0, 1.0, 0)])
    logits = np.full((3, 10), -1.0, np.float32)
    logits[[0, 1, 2], [4, 5, 9]] = 1.0
    emitted = [np.array([4, 7]), np.array([3])]
    drafter.observe(Verified([5, 6], emitted, np.array([1, 0]), None, torch.tensor(logits), np.array([0, 2])))
    assert drafter._successors[[1, 4, 2]].tolist() == [4, 5, 9]
    drafter.observe(verified({5: [8, 1], 6: []}))
    assert drafter._last[drafter._slots.of([5, 6])].tolist() == [1, 3]


def test_the_first_of_the_largest_logits_counts():
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 9, (7, 1000)).astype(np.float32)  # many equals
    logits[3] = -np.inf
    logits[3, 700] = -5
    starts, borders = np.array([0, 4]), np.array([0, 3, 6])
    places = [0, 1, 2, 4, 5, 6]
    assert likeliest(logits, starts, borders).tolist() == logits[places].argmax(1).tolist()
    assert likeliest(logits[3:4], np.array([0]), np.array([0, 1])).tolist() == [700]


# ---- standings ------------------------------------------------------------------------------------------------------


NOTHING = Outlook(1.0, 1.0)
"""a step that asks nobody"""


def sleeps(gain, seconds, steps=200):
    """Steps of `steps` in which a drafter of such gain and cost, in steps of one second, is asked."""
    standing, asked = Standing(), 0
    for step in range(1, steps + 1):
        if standing.begin_step(4):
            asked += 1
            standing.was_asked(4, seconds, 3)
            standing.judged(Outlook(1 + gain(step), 1.0), NOTHING, 1.0)
    return asked


def test_who_pays_is_always_asked_and_who_does_not_seldom_the_seldomer_the_dearer():
    assert sleeps(lambda step: 0.1, 0.5) == 200
    cheap, dear = sleeps(lambda step: -0.01, DEAR / 2), sleeps(lambda step: -0.5, 0.5)
    assert 2 <= dear < cheap < 60


def test_a_sleeper_wakes_where_it_begins_to_pay():
    assert sleeps(lambda step: 0.3 if step > 100 else -0.01, 0.01) > 80


def reader(gains, rows=1, seconds=0.5, steps=40):
    """Steps in which a drafter is asked that reads, and pays by such gains in turns."""
    standing, asked = Standing(reads=True), []
    for step in range(steps):
        if standing.begin_step(rows):
            asked.append(step)
            standing.was_asked(rows, seconds, 3)
            standing.judged(Outlook(1 + gains[step % len(gains)], 1.0), NOTHING, 1.0)
    return asked


def test_a_reader_may_promise_little_in_some_steps_and_is_tried_before_it_sleeps():
    assert reader([-0.25, -0.25, -0.25, 0.9]) == list(range(40)), "on average it pays"
    assert reader([-0.1]) == list(range(24))
    assert len(reader([-0.1], steps=300)) == 32, "and when it wakes, shorter"
    assert reader([-0.6]) == [0, 1, 2], "hopeless"
    assert len(reader([-0.1], rows=64, steps=30)) == 3, "of many sequences reading takes too long"


def test_what_a_reader_missed_is_not_what_asking_it_takes():
    standing, asked = Standing(reads=True), 0
    for step in range(1200):
        if standing.begin_step(1):
            standing.was_asked(1, 9.0 if step - asked > 1 else 0.5, 4)
            standing.judged(Outlook(2.0 if step < 200 else 0.1, 1.0), NOTHING, 1.0)
            asked = step
    assert asked > 600 and standing.asleep and standing.seconds == pytest.approx(0.5, rel=0.01)


def test_what_a_drafters_drafts_take_beyond_others_is_its_own_if_it_reads():
    reader, table = Standing(reads=True), Standing()
    for _ in range(20):
        found = reader.was_verified(4, 1.3, 1.0), table.was_verified(4, 1.3, 1.0)
    assert found == (pytest.approx(0.3), 0.0)


def test_whole_drafts_that_pay_on_average_keep_a_reader_awake():
    standing, counts = Standing(reads=True), np.zeros((MATCHES, CONFIDENCES, DEPTHS, 2))
    counts[..., :] = 90, 100
    for _ in range(100):
        assert standing.begin_step(1)
        standing.consider(counts, 1, lambda rows, tokens: 1.0, 0.0)
        standing.was_asked(1, 0.2, standing.limit)
        standing.judged(Outlook(0.8, 1.0), NOTHING, 1.0, deciding=0.01, alone=True)
    assert standing.gain > 1


def test_a_drafter_that_reads_is_judged_apart_for_batches_of_other_sizes():
    standings = Standings(reads=True)
    for _ in range(4):
        if standings.of(64).begin_step(64):
            standings.of(64).was_asked(64, 0.5, 3)
            standings.of(64).judged(Outlook(0.5, 1.0), NOTHING, 1.0)
    assert standings.of(33) is standings.of(64) is not standings.of(32) and standings.of(1) is not standings.of(2)
    assert not standings.of(64).begin_step(64) and standings.of(2).begin_step(2)


def test_for_others_a_batch_of_another_size_is_a_reason_to_ask_again():
    standings = Standings(reads=False)
    standing = standings.of(64)
    assert standings.of(2) is standing
    for _ in range(7):
        if standing.begin_step(64):
            standing.was_asked(64, 0.5, 3)
            standing.judged(Outlook(0.5, 1.0), NOTHING, 1.0)
    assert not standing.awake(64) and not standing.awake(2)
    for _ in range(6):
        assert not standing.begin_step(64)
    assert not standing.awake(64) and standing.awake(2)


def test_the_least_of_late_counts_so_that_a_pause_is_no_cost():
    standing = Standing()
    assert math.isnan(standing.gain) and standing.seconds == 0
    for seconds in (3.0, 0.01, 5.0, 0.01):
        standing.was_asked(1, seconds, 1)
        standing.was_told(seconds)
    assert standing.seconds < 0.025 and standing.part_of(1.0) == standing.seconds


# ---- stacks and groups ----------------------------------------------------------------------------------------------


def test_of_stacked_drafts_the_chosen_beginnings_are_taken():
    stack = Stack(2, 3, 4)
    stack.put(0, Proposal(np.array([[1, 2], [3, 0], [0, 0]]), np.array([2, 1, 0]), matches=np.array([5, 6, 0])))
    confidences = np.linspace(0.1, 0.9, 12, dtype=np.float32).reshape(3, 4)
    stack.put(1, Proposal(np.arange(12).reshape(3, 4) + 10, np.array([4, 4, 4]), confidences=confidences))
    assert stack.tokens[0].tolist() == [[1, 2, -1, -1], [3, -1, -1, -1], [-1] * 4]
    assert stack.matches.tolist() == [[5, 6, 0], [-1, -1, -1]] and (stack.confidences[0] == -1).all()
    chosen = stack.chosen(np.array([0, 1, -1]), np.array([4, 3, 4]), ["a", "b"])
    assert chosen.token_ids.tolist() == [[1, 2, 0], [14, 15, 16], [0, 0, 0]] and chosen.lengths.tolist() == [2, 3, 0]
    assert list(chosen.drafted_by) == ["a", "b", ""] and chosen.matches.tolist() == [5, 0, 0]
    assert chosen.confidences[1].tolist() == confidences[1, :3].tolist()


def test_groups_are_forgotten_with_their_last_sequence():
    progress = GroupProgress()
    for round_ in range(3):
        progress.begin([SequenceStart(10 * round_ + i, np.array([1]), 4, 1.0, 0) for i in range(2)])
        progress.observe([verified({10 * round_: [1, 2, 3], 10 * round_ + 1: [4]})])
        progress.end([10 * round_])
        progress.begin([SequenceStart(10 * round_ + 5, np.array([1]), 9, 1.0, 0)])
        urgency = progress.urgency([10 * round_ + 1, 10 * round_ + 5], 0.4)
        assert urgency.tolist() == [1 + 0.4 * 0.5, 1.0]
        progress.end([10 * round_ + 1, 10 * round_ + 5, 999])


def test_a_groups_progress_is_the_same_told_at_once():
    starts = [SequenceStart(i, np.array([1]), i // 2, 1.0, 0) for i in range(4)]
    steps = [
        verified({0: [1], 1: [2, 3]}),
        verified({0: [4, 4, 4], 1: [5]}),
        verified({1: [6], 3: [7]}),
        verified({3: [8]}),
    ]
    together, apart = GroupProgress(), GroupProgress()
    for progress in (together, apart):
        progress.begin(starts)
    together.observe(steps)
    for step in steps:
        apart.observe([step])
    assert together.urgency(range(4), 0.4).tolist() == apart.urgency(range(4), 0.4).tolist() == [1.24, 1.24, 1.0, 1.0]


def test_one_drafter_alone_is_stacked_as_among_others():
    confidences = np.linspace(0.1, 0.9, 12, dtype=np.float32).reshape(3, 4)
    for proposal in (
        Proposal(np.arange(12).reshape(3, 4), np.array([4, 1, 0])),
        Proposal(
            np.arange(12).reshape(3, 4), np.array([4, 1, 0]), matches=np.array([5, 6, 0]), confidences=confidences
        ),
    ):
        stack, one = Stack(1, 3, 4), Stack.of_one(proposal)
        stack.put(0, proposal)
        for row, n in enumerate([4, 1, 0]):
            assert one.tokens[0, row, :n].tolist() == stack.tokens[0, row, :n].tolist()
        for name in ("lengths", "matches", "confidences"):
            assert getattr(one, name).tolist() == getattr(stack, name).tolist()
            assert getattr(one, name).dtype == getattr(stack, name).dtype
