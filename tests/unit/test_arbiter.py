"""What the arbiter believes, decides and learns."""

import itertools

import msgspec
import numpy as np
import pytest
import torch
from msgspec import Struct

from drafters import acceptance, allocation
from drafters import arbiter as arbiter_module
from drafters.arbiter import ArbiterDrafter
from drafters.base import BaseDrafter, Drafter, DraftRequest, Needs, Proposal, SequenceStart, Verified
from drafters.cost_model import PER_ROW, ROWS, CostModel
from drafters.delegation import Delegation
from drafters.guard import Guard
from drafters.none import NoDrafter
from drafters.plain_steps import PlainSteps
from drafters.prompt_lookup import PromptLookupDrafter
from drafters.rehearsal import VOCABULARY
from drafters.replay import RecordedText, replay
from drafters.standing import Standing
from drafters.suffix_automaton import SuffixAutomatonDrafter
from drafters.testing import check_distribution, check_drafter
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError
from tests.unit.generation import Sampled, finish, group, texts
from tests.unit.tiny_models import save_tiny

# ---- costs ----------------------------------------------------------------------------------------------------------


def linear(rows, tokens):
    return 0.005 + 1e-4 * rows + 2e-4 * tokens


def test_costs_between_the_places_of_the_table_are_near_the_function_it_was_made_of():
    costs = CostModel.of(linear)
    for rows, per_row in itertools.product(ROWS, PER_ROW):
        tokens = int(rows * per_row)
        if tokens == rows * per_row:
            assert costs.seconds(int(rows), tokens) == pytest.approx(linear(rows, tokens))
    for rows, tokens in ((3, 5), (5, 20), (23, 100), (50, 51), (100, 900), (1, 48)):
        assert costs.seconds(rows, tokens) == pytest.approx(linear(rows, tokens), rel=0.1)
    assert costs.seconds(512, 1024) == pytest.approx(2 * costs.seconds(256, 512))


def test_steps_bend_the_table_to_what_they_take():
    costs, rng = CostModel(), np.random.default_rng(0)
    busy = 1.0
    for step in range(3000):
        rows = int(rng.choice([1, 3, 8, 30]))
        tokens = rows + int(rng.integers(0, 6 * rows + 1))
        if step % 200 == 0:
            busy = rng.uniform(0.6, 1.6)  # others use the machine
        costs.observe(
            rows, tokens, busy * linear(rows, tokens) * rng.lognormal(0, 0.05) * (30 if step % 97 == 0 else 1)
        )
    for rows in (1, 3, 8, 30):
        for per_row in (1.5, 2, 4, 6):
            tokens = int(rows * per_row)
            learned = costs.seconds(rows, tokens) / costs.seconds(rows, rows)
            assert learned == pytest.approx(linear(rows, tokens) / linear(rows, rows), rel=0.12), (rows, tokens)


def test_measurements_are_met_and_more_tokens_are_never_cheaper():
    costs = CostModel()
    measured = {(1, n): linear(1, n) for n in (1, 2, 4, 8)} | {(16, 16 * n): linear(16, 16 * n) for n in (1, 2, 4)}
    costs.fit(measured)
    for (rows, tokens), seconds in measured.items():
        assert costs.seconds(rows, tokens) == pytest.approx(seconds, rel=0.02)
    assert (np.diff(costs.table, axis=1) >= 0).all()
    costs.fit({})


def test_known_costs_stay_as_they_are():
    costs = CostModel.of(linear)
    before = costs.table.copy()
    costs.observe(4, 8, 100.0)
    assert (costs.table == before).all() and costs.scale[0] == 1


# ---- acceptance -----------------------------------------------------------------------------------------------------


def learn_from(drafts, emitted, matches=-1, confidences=-1.0):
    """Counts after one step of one drafter."""
    counts = np.zeros((1, acceptance.MATCHES, acceptance.CONFIDENCES, acceptance.DEPTHS, 2))
    chances = np.zeros(counts.shape[:-1])
    rows, width = len(drafts), max(map(len, drafts))
    tokens = np.zeros((1, rows, width), np.int64)
    for row, draft in enumerate(drafts):
        tokens[0, row, : len(draft)] = draft
    borders = np.cumsum([0, *map(len, emitted)])
    acceptance.learn(
        counts, chances, tokens, np.array([[len(d) for d in drafts]]), np.full((1, rows), matches),
        np.full((1, rows, width), confidences, np.float32), np.concatenate(emitted), borders,
    )  # fmt: skip
    return counts, chances


def test_a_draft_teaches_up_to_its_first_error_and_no_further_than_what_was_emitted():
    counts, _ = learn_from(
        [[1, 2, 3], [4, 9, 5], [6, 7, 8], []], [np.array(e) for e in ([1, 2, 3, 4], [4, 5], [6], [7])]
    )
    by_depth = counts[0, 0, 0]
    assert by_depth[0].tolist() == [3, 3]  # first tokens 1, 4, 6
    assert by_depth[1].tolist() == [1, 2]  # 2 right, 9 wrong, 7 never seen
    assert by_depth[2].tolist() == [1, 1]


def test_cells_are_those_of_match_confidence_and_depth():
    for matches, confidence, expected in (
        (-1, -1, (0, 0)),
        (0, 0.1, (0, 1)),
        (1, 0.5, (1, 2)),
        (4, 0.75, (3, 4)),
        (99, 1, (7, 7)),
    ):
        counts, _ = learn_from([[1]], [np.array([1])], matches, confidence)
        assert tuple(np.argwhere(counts[0, :, :, 0, 1])[0]) == expected
    assert [acceptance.bucket(0, -1.0, d)[2] for d in (0, 1, 2, 3, 4, 7, 8, 50)] == [0, 1, 2, 2, 3, 3, 4, 4]


def test_estimates_approach_the_truth_and_lean_on_similar_cells_before():
    rng, truth = np.random.default_rng(0), 0.83
    counts = np.zeros((1, acceptance.MATCHES, acceptance.CONFIDENCES, acceptance.DEPTHS, 2))
    chances = np.zeros(counts.shape[:-1])
    acceptance.refresh(counts, chances)
    for c, nominal in enumerate(acceptance.NOMINAL):
        assert (chances[0, :, c] == nominal).all()
    for _ in range(300):
        right = rng.random(4) < truth
        acceptance.learn(
            counts, chances, np.ones((1, 4, 1), np.int64), np.ones((1, 4), np.int64), np.full((1, 4), 5),
            np.full((1, 4, 1), 0.85, np.float32), np.where(right, 1, 2), np.arange(5),
        )  # fmt: skip
    assert chances[0, 4, 5, 0] == pytest.approx(truth, abs=0.05)
    assert chances[0, 6, 5, 2] == pytest.approx(truth, abs=0.06)  # the same confidence, never met with this match
    assert chances[0, 6, 1, 0] == acceptance.NOMINAL[1]  # another confidence
    assert counts.max() <= acceptance.MOST


# ---- allocation -----------------------------------------------------------------------------------------------------


def allocated(survivals, cost, urgency=None, trial=False):
    """Lengths and choice for drafts [D, B, K] with given survivals; chances are stubbed by one cell a token."""
    drafters, rows, width = survivals.shape
    conditional = survivals / np.concatenate([np.ones((drafters, rows, 1)), survivals[:, :, :-1]], axis=2)
    # A cell holds one chance, so rows of the test share chances by (match bucket, depth bucket).
    chances = np.zeros((drafters, acceptance.MATCHES, acceptance.CONFIDENCES, acceptance.DEPTHS))
    matches = np.tile(np.array([0, 1, 2, 4, 8, 16, 32, 99])[:rows], (drafters, 1))
    for d, b, k in np.ndindex(survivals.shape):
        chances[(d, *acceptance.bucket(matches[d, b], -1.0, k))] = conditional[d, b, k]
    costs, reasons = CostModel.of(cost), np.zeros(len(allocation.REASONS), np.int64)
    choice, lengths, count, _, tokens, seconds, *_ = allocation.allocate(
        chances, matches, np.full(survivals.shape, -1, np.float32), np.full((drafters, rows), width),
        np.full(rows, width), np.ones(rows) if urgency is None else urgency, costs.table, 1.0, 0.0, 0.2, trial,
        reasons,
    )  # fmt: skip
    assert count == lengths.sum()
    return choice, lengths, tokens / seconds, reasons


@pytest.mark.parametrize("seed", range(12))
def test_the_allocation_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    rows, width = 4, 3
    survivals = np.cumprod(rng.uniform(0.2, 0.98, (1, rows, width)), axis=2)
    a, b = rng.uniform(1e-3, 1e-2), rng.uniform(1e-4, 4e-3)

    def cost(rows, tokens):
        return a + b * tokens

    _, lengths, rate, _ = allocated(survivals, cost)
    best = max(
        (rows + sum(survivals[0, row, :n].sum() for row, n in enumerate(choice))) / cost(rows, rows + sum(choice))
        for choice in itertools.product(range(width + 1), repeat=rows)
    )
    assert rate == pytest.approx(best, rel=0.006)  # less than that is not worth drafting
    assert rate == pytest.approx(
        (rows + sum(survivals[0, row, :n].sum() for row, n in enumerate(lengths))) / cost(rows, rows + lengths.sum())
    )


def test_each_sequence_gets_the_drafter_that_serves_it():
    survivals = np.zeros((2, 2, 2))
    survivals[0] = [[0.9, 0.8], [0.3, 0.1]]
    survivals[1] = [[0.5, 0.2], [0.8, 0.7]]
    choice, lengths, _, reasons = allocated(survivals, lambda rows, tokens: 0.01 + 1e-4 * tokens)
    assert choice.tolist() == [0, 1] and lengths.tolist() == [2, 2]
    assert dict(zip(allocation.REASONS, reasons.tolist(), strict=True))["drafted"] == 2


def test_where_tokens_cost_what_they_bring_nothing_is_drafted_but_in_a_trial():
    survivals = np.full((1, 3, 2), 0.0)
    survivals[0] = [[0.9, 0.8], [0.6, 0.3], [0.5, 0.1]]

    def dear(rows, tokens):
        return 0.01 * tokens

    assert allocated(survivals, dear)[1].tolist() == [0, 0, 0]
    assert allocated(survivals, dear)[3][allocation.DOES_NOT_PAY] == 3
    assert allocated(survivals, dear, trial=True)[1].tolist() == [1, 0, 0]
    hopeless = np.full((1, 3, 1), 0.02)
    assert allocated(hopeless, lambda rows, tokens: 0.01 * tokens**3, trial=True)[1].tolist() == [0, 0, 0]


def test_few_sequences_get_more_than_many_and_urgent_ones_more_than_others():
    def cost(rows, tokens):
        return 0.004 + 5e-4 * tokens

    alike = np.cumprod(np.full((1, 8, 4), 0.75), axis=2)
    many, few = allocated(alike, cost)[1], allocated(alike[:, :1], cost)[1]
    assert few[0] > many.mean()
    urgent = allocated(alike, cost, urgency=np.array([1.0] * 7 + [1.6]))[1]
    assert urgent[7] > urgent[:7].mean() and urgent[:7].max() <= many.max()


# ---- the drafter ----------------------------------------------------------------------------------------------------


def rollouts(seed, prompts=6, samples=6, length=80, surprise=0.05):
    """Texts of a language with phrases, whose samples of a prompt are much alike."""
    rng = np.random.default_rng(seed)
    phrases = [rng.integers(0, 200, rng.integers(4, 12)) for _ in range(12)]
    found = []
    for g in range(prompts):
        prompt = rng.integers(0, 200, 20)
        plan = rng.integers(0, len(phrases), 30)
        for _ in range(samples):
            text = np.concatenate([phrases[p] for p in plan])[: rng.integers(length // 2, length)]
            found.append(
                RecordedText(
                    prompt, np.where(rng.random(len(text)) < surprise, rng.integers(0, 200, len(text)), text), g
                )
            )
    return found


class Capped(BaseDrafter):
    """Another drafter with a shorter draft."""

    def __init__(self, drafter, most):
        self.drafter, self.most, self.name = drafter, most, f"{drafter.name} {most}"
        self.begin, self.observe, self.end = drafter.begin, drafter.observe, drafter.end

    def propose(self, request):
        return self.drafter.propose(msgspec.structs.replace(request, budgets=np.minimum(request.budgets, self.most)))


def arbiter(cost=linear, drafters=("suffix-automaton", "prompt-lookup"), **options):
    options = ArbiterDrafter.Options(drafters=list(drafters), **options)
    return ArbiterDrafter(options, CostModel.of(cost), clock=lambda: 0.0)


COSTS = {
    "flat": lambda rows, tokens: 0.01 + 2e-5 * tokens,
    "linear": linear,
    "a knee at 16": lambda rows, tokens: 0.004 + 2e-4 * rows + 4e-4 * max(0, tokens - 16),
    "dear": lambda rows, tokens: 1e-3 * tokens,
}


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("slots", [1, 12])
def test_in_replay_the_arbiter_loses_little_to_the_best_single_choice(name, slots):
    """Regret against the best of none and two drafters at many lengths, with the recorded costs: at most 3%."""
    for surprise in (0.03, 0.5):
        recorded, cost = rollouts(1, prompts=4 if slots == 1 else 16, surprise=surprise), COSTS[name]
        single = [
            NoDrafter(),
            *(Capped(SuffixAutomatonDrafter(), n) for n in (1, 2, 4, 8, 16)),
            Capped(PromptLookupDrafter(), 3),
        ]
        best = max(replay(d, recorded, slots=slots, max_draft_tokens=16, costs=cost).tokens_per_second for d in single)
        ours = replay(arbiter(cost), recorded, slots=slots, max_draft_tokens=16, costs=cost)
        assert ours.tokens_per_second > 0.97 * best, (surprise, ours.tokens_per_second / best)


def test_decisions_repeat_with_the_same_costs():
    first, second = (replay(arbiter(), rollouts(2), slots=8, max_draft_tokens=8, costs=linear) for _ in range(2))
    second.drafter_seconds = first.drafter_seconds
    assert first == second
    guess = ArbiterDrafter(ArbiterDrafter.Options(measure=False))
    assert guess.needs == guess.ensemble.needs and not guess.costs.learns


def test_pauses_among_steps_without_drafts_do_not_make_drafts_seem_dearer():
    """Calm steps after a pause undo it in all that it moved, alike."""
    rng, costs = np.random.default_rng(0), CostModel()
    costs.fit({(1, 1): 6e-4, (1, 2): 6.6e-4, (1, 4): 7.6e-4, (1, 8): 1e-3})
    before = costs.seconds(1, 4) / costs.seconds(1, 1)
    for _ in range(6000):
        pause = rng.exponential(1.0) if rng.random() < 0.05 else 0.0
        costs.observe_plain([(1, 6e-4 * (1 + 0.03 * abs(rng.normal())) * (1 + pause))])
    assert costs.seconds(1, 4) / costs.seconds(1, 1) == pytest.approx(before, rel=0.1)


def test_it_learns_costs_from_the_steps_and_then_does_as_well_as_with_known_ones():
    cost = COSTS["a knee at 16"]
    recorded = rollouts(3, prompts=12)
    known = replay(arbiter(cost), recorded, slots=12, max_draft_tokens=16, costs=cost)
    learning = ArbiterDrafter(ArbiterDrafter.Options(calibration_seconds=0), clock=lambda: 0.0)
    learned = replay(learning, recorded, slots=12, max_draft_tokens=16, costs=cost)
    assert learned.tokens_per_second > 0.95 * known.tokens_per_second


class Often(BaseDrafter):
    """Always has a draft, and is right with two tokens of five."""

    name = "often"

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def propose(self, request):
        tokens = np.where(self.rng.random((len(request.ids), 2)) < 0.4, 7, 9)
        return Proposal(tokens, np.minimum(request.budgets, 2))


def test_it_learns_from_steps_without_drafts_that_drafting_at_all_costs_something(monkeypatch):
    """As where drafts are verified by another way than none is: a drafter that always drafts would never show it."""

    def cost(rows, tokens):
        return 0.002 + 2.5e-4 * rows + (0.003 if tokens > rows + 1e-6 else 0) + 5e-5 * (tokens - rows)

    recorded = [RecordedText(np.ones(5, np.int64), np.full(250, 7), i) for i in range(8)]

    def of_plain():
        learning = ArbiterDrafter(ArbiterDrafter.Options(calibration_seconds=0), clock=lambda: 0.0, drafters=[Often()])
        plain = replay(NoDrafter(), recorded, slots=4, max_draft_tokens=2, costs=cost).tokens_per_second
        return replay(learning, recorded, slots=4, max_draft_tokens=2, costs=cost).tokens_per_second / plain

    assert of_plain() > 0.95
    monkeypatch.setattr(PlainSteps, "due", lambda self, rows: False)
    assert of_plain() < 0.9


def test_where_nobody_says_what_steps_take_it_drafts_by_its_guess():
    learning = ArbiterDrafter(ArbiterDrafter.Options(calibration_seconds=0), drafters=[Often()])
    learning.begin([SequenceStart(1, np.array([5]), 0, 1.0, 0)])
    drafted = 0
    for _ in range(20):
        proposal = learning.propose(DraftRequest([1], np.array([2]), np.ones(1, np.float32)))
        drafted += int(proposal.lengths.sum())
        learning.observe(Verified([1], [np.array([7])], np.zeros(1, np.int64)))
    assert drafted and learning.counters()["measuring"] == 4


class Dear(BaseDrafter):
    """A model, say: it takes its time by the injected clock."""

    name = "dear"

    def __init__(self, clock, seconds, right):
        self.clock, self.seconds, self.right, self.calls = clock, seconds, right, 0

    def propose(self, request):
        self.calls += 1
        self.clock.now += self.seconds
        tokens = np.full((len(request.ids), 4), 7 if self.right else 9)
        return Proposal(tokens, np.minimum(request.budgets, 4))


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    ("seconds", "right", "often"), [(0.004, True, True), (0.004, False, False), (0.2, True, False)]
)
def test_a_dear_drafter_is_asked_where_it_pays_and_now_and_then_otherwise(seconds, right, often):
    clock = Clock()
    recorded = [RecordedText(np.array([1]), np.full(400, 7), 0)]
    dear = Dear(clock, seconds, right)
    drafter = ArbiterDrafter(costs=CostModel.of(COSTS["flat"]), clock=clock, drafters=[dear])
    totals = replay(drafter, recorded, slots=1, max_draft_tokens=4, costs=COSTS["flat"])
    assert (dear.calls > 0.9 * totals.steps) if often else (2 <= dear.calls < 0.2 * totals.steps)


class OneRight(Dear):
    """The first token of each draft is right."""

    def propose(self, request):
        proposal = super().propose(request)
        proposal.token_ids[:, 1:] = 9
        return proposal


def slow_arbiter(monkeypatch, part, seconds, clock, drafters, cost):
    """Of these drafters, whose part takes so long."""
    stock = getattr(arbiter_module, part)

    def slow(*arguments):
        clock.now += seconds
        return stock(*arguments)

    monkeypatch.setattr(arbiter_module, part, slow)
    return ArbiterDrafter(costs=CostModel.of(cost), clock=clock, drafters=drafters)


def slow_decisions(monkeypatch, part, seconds, dear, cost):
    """Replay of one long text by an arbiter of this drafter, whose part takes so long."""
    recorded = [RecordedText(np.array([1]), np.full(4000, 7), 0)]
    drafter = slow_arbiter(monkeypatch, part, seconds, dear.clock, [dear], cost)
    return drafter, replay(drafter, recorded, slots=1, max_draft_tokens=4, costs=cost)


@pytest.mark.parametrize(
    ("part", "seconds", "often"), [("allocate", 0.0, True), ("allocate", 0.02, False), ("learn", 0.04, False)]
)
def test_where_deciding_takes_more_than_drafts_bring_the_only_drafter_sleeps(monkeypatch, part, seconds, often):
    """Its own time, of proposing and of observing, is spared where nobody is asked."""
    dear = OneRight(Clock(), 1e-5, True)
    drafter, totals = slow_decisions(monkeypatch, part, seconds, dear, lambda rows, tokens: 0.001 + 4e-3 * tokens)
    assert (dear.calls > 0.9 * totals.steps) if often else (2 <= dear.calls < 0.3 * totals.steps)
    assert drafter.counters()["not decided"] == 0


def test_where_deciding_takes_more_than_it_brings_whole_drafts_are_verified(monkeypatch):
    dear = Dear(Clock(), 1e-5, True)
    drafter, totals = slow_decisions(monkeypatch, "allocate", 0.002, dear, lambda rows, tokens: 0.004 + 1e-3 * tokens)
    assert dear.calls > 0.9 * totals.steps
    assert 0.7 * totals.steps < drafter.counters()["not decided"] < 0.95 * totals.steps
    assert totals.by_drafter == {"dear": (totals.drafted, totals.accepted)}
    assert dear.clock.now < 0.3 * 0.002 * totals.steps


class Copying(Dear):
    """Sure of itself and right in every second text, and neither in the others."""

    name = "copying"

    def propose(self, request):
        proposal = super().propose(request)
        self.right = request.ids[0] % 2 == 0
        tokens = np.full((1, 4), 7 if self.right else 9)
        sure = np.full((1, 4), 0.98 if self.right else 0.2, np.float32)
        return Proposal(tokens, proposal.lengths, confidences=sure)


def test_two_drafters_take_turns_without_a_decision_by_what_the_first_promises(monkeypatch):
    """In a single sequence, where the second takes its time and the first none, and deciding takes long."""
    clock = Clock()
    copying, reading = Copying(clock, 1e-5, True), Dear(clock, 0.001, True)
    reading.needs = Needs.HIDDEN_STATES
    texts = [RecordedText(np.array([1]), np.full(150, 7), i) for i in range(24)]
    drafter = slow_arbiter(monkeypatch, "allocate", 0.002, clock, [copying, reading], lambda n, t: 0.004 + 1e-4 * t)
    totals = replay(drafter, texts, slots=1, max_draft_tokens=4, costs=lambda n, t: 0.004 + 1e-4 * t)
    assert drafter.counters()["not decided"] > 0.7 * totals.steps
    assert copying.calls > 0.9 * totals.steps and 0.4 * totals.steps < reading.calls < 0.65 * totals.steps
    assert totals.accepted > 0.9 * totals.drafted, "the first drafts where it is right alone"
    chances = drafter._chances[0, 0, :, 0]
    assert chances[1] < 0.1 and chances[7] > 0.9, "it is learnt from also where the other one drafts"


@pytest.mark.parametrize("needs", [Needs.HIDDEN_STATES, Needs.NOTHING])
def test_a_drafter_that_reads_and_did_not_pay_is_tried_on_a_few_sequences_until_it_does(needs):
    class Turning(Dear):
        """Wrong at first, then right."""

        seen, asked = 0, ()

        def propose(self, request):
            self.right = self.seen > 16 * 300
            self.asked += ((self.right, np.count_nonzero(request.budgets)),)
            return super().propose(request)

        def observe(self, verified):
            self.seen += sum(map(len, verified.emitted))

    clock = Clock()
    recorded = [RecordedText(np.array([1]), np.full(2000, 7), i) for i in range(16)]
    turning = Turning(clock, 0.004, False)
    turning.needs = needs
    drafter = ArbiterDrafter(costs=CostModel.of(COSTS["flat"]), clock=clock, drafters=[turning])
    totals = replay(drafter, recorded, slots=16, max_draft_tokens=4, costs=COSTS["flat"])
    wrong, right = ([rows for now, rows in turning.asked if now == then] for then in (False, True))
    assert len(wrong) < 40 and wrong[0] == 16
    assert wrong.count(4) >= 3 if needs else set(wrong) == {16}, "what costs nothing to catch up is asked for all"
    assert right.count(16) > 0.3 * 1700 / 5 and totals.accepted > 0.3 * 16 * 1700 * 4 / 5


def test_hopeless_drafts_are_given_a_rest():
    rng = np.random.default_rng(0)
    recorded = [RecordedText(rng.integers(0, 9, 20), rng.integers(0, 9, 300), i) for i in range(4)]
    drafter = arbiter(COSTS["dear"])
    totals = replay(drafter, recorded, slots=4, max_draft_tokens=8, costs=COSTS["dear"])
    counters = drafter.counters()
    assert counters["resting"] > 0.6 * totals.verifications and totals.drafted < 0.1 * totals.tokens
    decisions = [counters[name] for name in ("drafted", "nothing known", "does not pay", "no room", "resting")]
    assert sum(decisions) == totals.verifications


def test_the_last_of_a_group_and_the_longest_are_more_urgent():
    drafter = arbiter(urgency=0.5)
    drafter.begin([SequenceStart(i, np.array([1]), i // 4, 1.0, i) for i in range(8)])
    drafter.observe(Verified(list(range(8)), [np.full(5 if i == 7 else 1, 3) for i in range(8)], np.zeros(8, np.int64)))
    drafter.end([0, 1, 2])
    urgency = drafter._progress.urgency([3, 4, 7], 0.5)
    assert urgency[0] == 1 + 0.5 * 0.75 and urgency[1] == 1 and urgency[2] == 1.5
    assert drafter._progress.urgency([3, 4], 0).tolist() == [1, 1]


# ---- in the generator -----------------------------------------------------------------------------------------------


def test_the_arbiter_keeps_to_the_protocol():
    for drafters in (["suffix-automaton", "prompt-lookup"], ["suffix-automaton", "token-recycling"]):
        check_drafter(lambda drafters=drafters: arbiter(drafters=drafters), samples=500)


def test_texts_stay_as_they_are_and_every_drafter_is_told(tmp_path):
    folder = save_tiny(tmp_path, sharpness=6.0)
    plain = NativeGenerator(folder, max_sequences=8, stop_token_ids=())
    options = ArbiterDrafter.Options(drafters=["suffix-automaton", "token-recycling"], calibration_seconds=0.2)
    drafter = ArbiterDrafter(options)
    assert isinstance(drafter, Drafter)
    generator = NativeGenerator(folder, drafter=drafter, max_sequences=8, max_draft_tokens=8, stop_token_ids=())
    assert drafter.costs.seconds(4, 8) < 0.5
    for g in (plain, generator):
        g.add(group(samples=12, max_new_tokens=60))
    done = finish(generator)
    assert texts(done) == texts(finish(plain))
    names = {name for sample in done.values() for name in sample.drafters}
    assert names <= {"suffix-automaton", "token-recycling"} and names
    assert generator.stats().drafter_failures == 0
    assert generator.drafter_counters()["drafted"] > 0


def test_a_drafter_with_probabilities_is_one_among_others(tmp_path):
    folder = save_tiny(tmp_path)
    drafter = ArbiterDrafter(costs=CostModel.of(COSTS["flat"]), drafters=[SuffixAutomatonDrafter(), Sampled()])
    generator = NativeGenerator(folder, drafter=drafter, max_sequences=8, max_draft_tokens=4, stop_token_ids=())
    generator.add(group(samples=30, max_new_tokens=40))
    done = finish(generator)
    assert generator.stats().drafter_failures == 0
    assert {name for s in done.values() for name in s.drafters} == {"suffix-automaton", "sampled"}


class Telling(BaseDrafter):
    """Draws tokens of which half let it go on, sure of itself, and the others make it stop."""

    name = "telling"

    class Options(Struct):
        seed: int = 0
        surer: bool = False
        """whether it is the surer of a first token, too, the better it is"""

    def __init__(self, options):
        self.surer = options.surer
        self.generator = torch.Generator().manual_seed(options.seed)
        self.law = torch.full((VOCABULARY,), 0.1 / (VOCABULARY - 2))
        self.law[[8, 15]] = 0.45  # what the target of the kit likes, too

    def propose(self, request):
        rows = len(request.ids)
        drawn = torch.multinomial(self.law.expand(rows, -1), 3, replacement=True, generator=self.generator).numpy()
        good = drawn[:, 0] == 8
        lengths = np.minimum(request.budgets, np.where(good, 3, 1))
        first = np.arange(3) == (-1 if self.surer else 0)
        confidences = np.where(good[:, None] | first, 0.7, 0.1).astype(np.float32)
        return Proposal(drawn, lengths, self.law.expand(rows, 3, -1), confidences=confidences)


def test_choosing_among_drawn_drafts_leaves_the_distribution_as_it_is(monkeypatch):
    """A choice by what was drawn would not: it verifies token 8 more often than it is drawn."""
    pieces = [{"name": f"{__name__}:Telling", "seed": seed} for seed in range(3)]

    def make():
        options = ArbiterDrafter.Options(drafters=pieces)
        return ArbiterDrafter(options, CostModel.of(lambda rows, tokens: rows + 0.01 * tokens), clock=lambda: 0.0)

    check_distribution(make, 2000)
    monkeypatch.setattr(arbiter_module, "blind", lambda *arguments: None)
    with pytest.raises(AssertionError, match="do not follow the target"):
        check_distribution(make, 2000)


@pytest.mark.parametrize("needs", [Needs.NOTHING, Needs.LAYER_STATES])
def test_whole_drafts_without_a_decision_leave_the_distribution_as_it_is(monkeypatch, needs):
    """Some of them end by what was drawn, as a drafter's own drafts may."""
    made = []

    def make():
        telling = Telling(Telling.Options())
        telling.needs = needs
        made.append(ArbiterDrafter(costs=CostModel.of(lambda rows, tokens: rows + 0.01 * tokens), drafters=[telling]))
        return made[-1]

    monkeypatch.setattr(Delegation, "take", lambda self, asked, rows, asleep: 3)
    check_distribution(make, 1000)
    assert made[-1].counters()["not decided"] > 500


class Repeating(BaseDrafter):
    """Now has a draft that the kit's target likes, now none."""

    name = "repeating"

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def propose(self, request):
        lengths = np.minimum(request.budgets, self.rng.choice([0, 3]))
        return Proposal(np.full((len(lengths), 3), 8), lengths)


def test_two_delegates_by_turns_leave_the_distribution_as_it_is(monkeypatch):
    """Who drafts may depend on what is certain, not on what was drawn."""
    by: list[str] = []

    def make():
        telling = Telling(Telling.Options())
        telling.needs = Needs.HIDDEN_STATES
        cost = CostModel.of(lambda rows, tokens: rows + 0.01 * tokens)
        drafter = ArbiterDrafter(costs=cost, drafters=[Repeating(), telling])
        propose = drafter.propose

        def noting(request):
            proposal = propose(request)
            if drafter._lull.delegates == (0, 1):
                by.extend(proposal.drafted_by or ())
            return proposal

        drafter.propose = noting
        return drafter

    monkeypatch.setattr(Delegation, "take", lambda self, asked, rows, asleep: 3 * (len(asked) == 2))
    monkeypatch.setattr(Standing, "may_add", lambda self, promised, plain: not promised.any())
    check_distribution(make, 1000)
    assert min(by.count("repeating"), by.count("telling")) > 200


def remembering(propose, proposals):
    def remembered(request):
        proposals.append(propose(request))
        return proposals[-1]

    return remembered


@pytest.mark.parametrize("surer", [False, True])
def test_whether_a_drawn_draft_is_verified_does_not_depend_on_what_was_drawn(surer):
    """Of a single sequence in its first step, where nothing is known of how long drafts are."""
    verified = {8: [], 15: []}
    for seed in range(120):
        drafter = ArbiterDrafter(
            costs=CostModel.of(lambda rows, tokens: 1.0 if tokens <= rows else 1.75),
            drafters=[Telling(Telling.Options(seed, surer))],
        )
        guard = Guard(drafter, VOCABULARY, pytest.fail)
        guard.begin([SequenceStart(0, np.array([1, 5, 9]), 0, 1.0, 0)])
        proposals: list[Proposal] = []
        telling = drafter.ensemble.drafters[0]
        telling.propose = remembering(telling.propose, proposals)
        proposal = guard.propose(DraftRequest([0], np.array([3]), np.ones(1, np.float32)))
        token = int(proposals[0].token_ids[0, 0])
        if token in verified:
            verified[token].append(bool(proposal.lengths[0]))
    assert len(verified[8]) > 30 and len(verified[15]) > 30
    assert {*verified[8]} == {*verified[15]} and len({*verified[8]}) == 1


def test_whose_turn_it_is_does_not_depend_on_what_the_first_drew():
    by = set()
    for seed in range(40):
        first, second = Telling(Telling.Options(seed)), Telling(Telling.Options(seed))
        second.name, second.needs = "second", Needs.HIDDEN_STATES
        drafter = ArbiterDrafter(costs=CostModel.of(COSTS["flat"]), drafters=[first, second], clock=lambda: 0.0)
        guard = Guard(drafter, VOCABULARY, pytest.fail)
        guard.begin([SequenceStart(0, np.array([1, 5, 9]), 0, 1.0, 0)])
        request = DraftRequest([0], np.array([3]), np.ones(1, np.float32))
        guard.propose(request)
        drafter._standings[1].reach.accepted = 0.5
        drafter._lull.begin((0, 1), 1, 1)
        proposals: list[Proposal] = []
        first.propose = remembering(first.propose, proposals)
        found = guard.propose(request).drafted_by
        by.add((tuple(found or ()), int(proposals[0].lengths[0])))
    assert by == {(("second",), 1), (("second",), 3)}


def test_an_arbiter_without_drafters_is_refused():
    with pytest.raises(UsageError, match="empty list"):
        ArbiterDrafter(ArbiterDrafter.Options(drafters=[]))


def test_an_empty_batch_of_budgets_is_no_trouble():
    drafter = arbiter()
    drafter.begin([SequenceStart(0, np.array([1, 2, 1]), 0, 1.0, 0)])
    proposal = drafter.propose(DraftRequest([0], np.zeros(1, np.int64), np.ones(1, np.float32)))
    assert proposal.lengths.tolist() == [0]


def test_a_prompt_that_begins_alone_wakes_sleepers_that_cost_next_to_nothing():
    """Not another sample of the same prompt, nor where others run."""

    def asked(group, rows):
        dear, reading = Dear(Clock(), 0.0, False), Dear(Clock(), 0.0, False)
        reading.needs = Needs.HIDDEN_STATES
        drafter = ArbiterDrafter(costs=CostModel.of(COSTS["flat"]), clock=dear.clock, drafters=[dear, reading])
        drafter.begin([SequenceStart(i, np.array([1]), 0, 1.0, i) for i in range(rows)])
        request = DraftRequest(list(range(rows)), np.full(rows, 4), np.ones(rows, np.float32))
        drafter.propose(request)
        for standing in drafter._standings:
            standing._wakes = 1000
        drafter.propose(request)
        drafter.begin([SequenceStart(99, np.array([1]), group, 1.0, 99)])
        before = dear.calls, reading.calls
        drafter.propose(request)
        return dear.calls - before[0], reading.calls - before[1]

    assert asked(1, 1) == (1, 0)
    assert asked(0, 1) == asked(1, 4) == (0, 0)


@pytest.mark.parametrize(("beside", "drafts"), [(0.0, False), (0.1, True)])
def test_what_the_engine_takes_beside_verification_counts(beside, drafts):
    """A draft of which two tokens in five are right takes as long as 1.75 plain steps: a loss, unless all take long."""
    clock = Clock()
    drafter = ArbiterDrafter(
        costs=CostModel.of(lambda rows, tokens: 0.01 if tokens == rows else 0.0175), clock=clock, drafters=[Often()]
    )
    drafter.begin([SequenceStart(1, np.array([5]), 0, 1.0, 0)])
    drafted = []
    for _ in range(300):
        proposal = drafter.propose(DraftRequest([1], np.array([2]), np.ones(1, np.float32)))
        draft = proposal.token_ids[0, : proposal.lengths[0]]
        accepted = 0 if not len(draft) or draft[0] != 7 else 1 + int(len(draft) > 1 and draft[1] == 7)
        seconds = 0.0175 if len(draft) else 0.01
        clock.now += beside + seconds
        drafter.observe(Verified([1], [np.full(accepted + 1, 7)], np.array([accepted]), seconds=seconds))
        drafted.append(len(draft) > 0)
    assert (sum(drafted[100:]) > 150) if drafts else (sum(drafted[100:]) < 50)
