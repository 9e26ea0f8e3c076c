"""How far an arbiter asks a drafter whose drafts take time by the token, and when it does without."""

import numpy as np
import pytest

from drafters.acceptance import CONFIDENCES, DEPTHS, MATCHES, refresh
from drafters.allocation import promised
from drafters.arbiter import ArbiterDrafter
from drafters.base import BaseDrafter, Needs, Proposal
from drafters.cost_model import CostModel
from drafters.reach import Reach
from drafters.replay import RecordedText, replay


def counts_of(*chances, seen=1e6):
    """Of depths 1, 2, 3-4, 5-8 and more."""
    counts = np.zeros((MATCHES, CONFIDENCES, DEPTHS, 2))
    counts[2, 3, :, 0], counts[2, 3, :, 1] = np.multiply(chances, seen), seen
    return counts


def seconds(rows, tokens):
    return 0.5 + 0.05 * rows * (tokens / rows - 1)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("chance", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("each", [0.01, 0.1, 0.4])
def test_drafts_go_as_far_as_promises_most_tokens_a_second(rows, chance, each):
    reach, counts = Reach(), counts_of(*[chance] * DEPTHS)
    for _ in range(300):
        width = reach.next
        reach.was_asked(width, 0.2 + each * width)
        if reach.due:
            reach.choose(counts, rows, seconds, 0.02)

    def rate(tokens):
        expected = sum(chance**k for k in range(tokens + 1))
        return rows * expected / (seconds(rows, rows * (1 + tokens)) + 0.22 + each * tokens)

    best = max(range(1, 17), key=rate)
    assert rate(reach.tokens) > 0.97 * rate(best)
    assert reach.accepted == pytest.approx(sum(chance**k for k in range(1, reach.tokens + 1)), rel=1e-3)
    assert reach.seconds(reach.tokens) == pytest.approx(0.2 + each * reach.tokens, rel=0.05)


def test_a_pause_of_the_machine_is_no_cost():
    reach = Reach()
    for step in range(100):
        reach.was_asked(4, 50.0 if step == 60 else 1.0)
    assert reach.seconds(4) < 1.05


def test_compiling_is_no_cost_either():
    reach = Reach()
    for step in range(6):
        reach.was_asked(4, 1.0 if step else 900.0)
    assert reach.seconds(4) == pytest.approx(1.0)


def test_what_verifying_takes_beyond_what_is_usual_is_learnt_by_width():
    reach, counts = Reach(), counts_of(*[0.95] * DEPTHS)
    for _ in range(400):
        width = reach.next
        reach.was_asked(width, 0.2)
        usual = seconds(1, 1 + width)
        reach.was_verified(width, usual + 0.05 + 0.04 * width, usual)
        if reach.due:
            reach.choose(counts, 1, seconds, 0.0)
    assert reach.beyond(reach.tokens) == pytest.approx(0.05 + 0.04 * reach.tokens, rel=0.05)
    best = max(range(1, 17), key=lambda n: sum(0.95**k for k in range(n + 1)) / (0.75 + 0.09 * n))
    assert abs(reach.tokens - best) <= 1 < 16 - best


def test_a_token_more_and_one_less_are_asked_for_by_turns():
    reach, widths = Reach(), []
    for _ in range(8):
        widths.append(reach.next)
        reach.was_asked(widths[-1], 1.0)
    assert widths == [4, 5, 4, 3] * 2


def test_what_a_draft_promises_is_the_sum_of_its_tokens_survivals():
    counts, chances = np.zeros((1, MATCHES, CONFIDENCES, DEPTHS, 2)), np.zeros((1, MATCHES, CONFIDENCES, DEPTHS))
    counts[0] = counts_of(0.9, 0.8, 0.5, 0.5, 0.5)
    refresh(counts, chances)
    confidences = np.full((2, 4), 0.65, np.float32)
    found = promised(chances[0], np.array([2, 2]), confidences, np.array([3, 0]))
    assert found == pytest.approx([0.9 + 0.9 * 0.8 + 0.9 * 0.8 * 0.5, 0], rel=1e-3)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Right(BaseDrafter):
    """Drafts what will come, by the token and by the injected clock."""

    def __init__(self, name, clock, each, needs, length=16):
        self.name, self.needs = name, needs
        self.clock, self.each, self.length, self.widths = clock, each, length, []

    def propose(self, request):
        lengths = np.minimum(request.budgets, self.length)
        self.widths.append(int(lengths.max()))
        self.clock.now += self.each * lengths.max()
        return Proposal(np.full((len(lengths), lengths.max()), 7), lengths)


def replayed(*drafters):
    costs = CostModel.of(lambda rows, tokens: 0.01 + 1e-3 * (tokens - rows))
    arbiter = ArbiterDrafter(costs=costs, clock=drafters[0].clock, drafters=drafters)
    recorded = [RecordedText(np.array([1]), np.full(3000, 7), 0)]
    replay(arbiter, recorded, slots=1, max_draft_tokens=16, costs=lambda rows, tokens: 0.01 + 1e-3 * (tokens - rows))
    return arbiter


def test_a_drafter_that_computes_a_model_is_asked_no_further_than_pays():
    class TwoRight(Right):
        def propose(self, request):
            proposal = super().propose(request)
            proposal.token_ids[:, 2:] = 9
            return proposal

    clock = Clock()
    reader, table = (TwoRight("some", clock, 1e-3, needs) for needs in (Needs.HIDDEN_STATES, Needs.NOTHING))
    replayed(reader)
    assert np.median(reader.widths[50:]) == 2
    replayed(table)
    assert np.median(table.widths) == 16, "one that computes none is asked as before"


def test_a_reader_is_spared_where_what_is_at_hand_promises_as_much():
    clock = Clock()
    long, reader = Right("table", clock, 0.0, Needs.NOTHING), Right("reader", clock, 1e-3, Needs.HIDDEN_STATES)
    arbiter = replayed(long, reader)
    assert len(reader.widths) < 0.2 * len(long.widths) and arbiter.counters()["spared"] > 0
    short, reader = (Right("table", clock, 0.0, Needs.NOTHING, 1), Right("reader", clock, 1e-4, Needs.HIDDEN_STATES))
    arbiter = replayed(short, reader)
    assert len(reader.widths) > 0.8 * len(short.widths), "a token at hand is not what it brings"
