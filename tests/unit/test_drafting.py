"""The guard around a drafter, and the watchdog that names one that does not return."""

import asyncio
import threading
import time

import numpy as np
import pytest
import torch

from drafters.base import BaseDrafter, DraftRequest, Proposal
from drafters.composite import CompositeDrafter, Ensemble, joined
from drafters.guard import Guard, checked
from drafters.rehearsal import VOCABULARY, Rehearsal, tiny_target
from drafters.suffix_automaton import SuffixAutomatonDrafter
from pipeline.engine.native.drafting import Drafting
from pipeline.engine.native.generator import NativeGenerator
from tests.unit.generation import Sampled, Scripted, finish, group, texts
from tests.unit.tiny_models import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def request(*budgets):
    return DraftRequest(range(len(budgets)), np.array(budgets), np.ones(len(budgets), np.float32))


class Slow(BaseDrafter):
    name = "slow"

    def __init__(self, seconds):
        self.seconds, self.calls = seconds, 0

    def propose(self, request):
        self.calls += 1
        time.sleep(self.seconds)
        return super().propose(request)


def test_a_drafter_that_takes_too_long_over_a_call_is_switched_off():
    drafter, events = Slow(0.05), []
    guard = Guard(drafter, 10, events.append, call_seconds=0.02)
    for _ in range(3):
        assert guard.propose(request(1, 1)).lengths.tolist() == [0, 0]
    assert drafter.calls == 1 and guard.failures == 1 and not guard.active
    assert len(events) == 1 and events[0].startswith("drafter slow is switched off after TooSlow: a call took 0.")


class Raising(BaseDrafter):
    name = "raising"

    def __init__(self, error):
        self.error = error

    def propose(self, request):
        raise self.error


@pytest.mark.parametrize("error", [asyncio.CancelledError("over"), BaseException("over"), SystemExit("over")])
def test_whatever_a_drafter_raises_switches_it_off(error):
    events = []
    assert Guard(Raising(error), 10, events.append).propose(request(1)).lengths.tolist() == [0]
    assert events == [f"drafter raising is switched off after {type(error).__name__}: over"]


def test_an_interrupt_from_the_keyboard_is_no_fault_of_the_drafter():
    guard = Guard(Raising(KeyboardInterrupt()), 10, pytest.fail)
    with pytest.raises(KeyboardInterrupt):
        guard.propose(request(1))
    assert guard.active and guard.failures == 0


def test_a_drafter_that_does_not_return_is_named_while_it_does_not():
    release, events = threading.Event(), []

    class Stuck(BaseDrafter):
        name = "stuck"

        def observe(self, verified):
            release.wait(20)

    class Around(CompositeDrafter):
        name = "around"

        def __init__(self):
            super().__init__(Ensemble([SuffixAutomatonDrafter(), Stuck()]))

    drafting = Drafting(Around(), Rehearsal(None, tiny_target()), events.append, watch_seconds=0.1)
    caller = threading.Thread(target=lambda: drafting.observe(None))
    caller.start()
    deadline = time.monotonic() + 10
    while len(events) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    release.set()
    caller.join()
    # The other drafter fails on the nonsense it is given; that is one event, and no reason to name it.
    stuck = [event for event in events if "not returned" in event]
    assert len(stuck) >= 2 and all(
        event.startswith("drafter around (in stuck) has not returned for") for event in stuck
    )
    calm = len(events)
    time.sleep(0.3)
    assert len(events) == calm


class Broken(BaseDrafter):
    name = "broken"

    def propose(self, request):
        raise KeyError("lost")


class Secretive(BaseDrafter):
    name = "secretive"

    def counters(self):
        return None


class Both(CompositeDrafter):
    """Every other row from each of two."""

    name = "both"

    def __init__(self, *drafters):
        super().__init__(Ensemble(drafters))

    def propose(self, request):
        proposals = [guard.propose(request) for guard in self.ensemble]
        choice = np.arange(len(request.ids)) % len(proposals)
        lengths = np.array([proposals[c].lengths[row] for row, c in enumerate(choice)])
        return joined(proposals, [guard.name for guard in self.ensemble], choice, lengths)


@pytest.mark.parametrize(
    ("bad", "why"), [(Broken(), "KeyError: 'lost'"), (Slow(0.3), "TooSlow: a call took 0.3 s, more than 0.2")]
)
def test_one_of_several_drafters_fails_alone(folder, bad, why):
    plain, events = NativeGenerator(folder, max_sequences=8), []
    both = Both(SuffixAutomatonDrafter(), bad)
    generator = NativeGenerator(folder, drafter=both, drafter_seconds=0.2, max_sequences=8, on_event=events.append)
    for g in (plain, generator):
        g.add(group(samples=8, max_new_tokens=30))
    done = finish(generator)
    assert texts(done) == texts(finish(plain))
    assert events == [f"drafter {bad.name} is switched off after {why}"]
    stats = generator.stats()
    assert stats.drafter_failures == 1 and stats.drafted > 0
    assert generator.drafter_counters()["switched off"] == 1


def test_a_drafter_whose_counters_are_none_costs_the_others_nothing(folder):
    generator = NativeGenerator(folder, drafter=Both(SuffixAutomatonDrafter(), Secretive()), on_event=pytest.fail)
    counters = generator.drafter_counters()
    assert counters["suffix-automaton.memory_tokens"] == 0 and "switched off" not in counters


def test_a_counter_that_is_no_figure_is_left_out():
    class Boastful(BaseDrafter):
        name = "boastful"

        def counters(self):
            return {"most": 10**400, "less": -(10**400), "word": "many", "texts": 3, "share": np.float32(0.5)}

    assert Guard(Boastful(), 10, pytest.fail).counters() == {"texts": 3, "share": 0.5}


def test_every_accepted_token_is_told_with_who_drafted_it(folder):
    plain = NativeGenerator(folder, max_sequences=8, stop_token_ids=())
    plain.add(group(samples=6, max_new_tokens=30))
    known = {key[1]: text for key, text in texts(finish(plain)).items()}
    right = Scripted(lambda start, emitted, budget: known[start.seed][len(emitted) :][:budget])
    wrong = Scripted(lambda start, emitted, budget: [0] * budget)
    right.name, wrong.name = "right", "wrong"
    generator = NativeGenerator(folder, drafter=Both(right, wrong), max_sequences=8, stop_token_ids=())
    generator.add(group(samples=6, max_new_tokens=30))
    done = finish(generator)
    assert {name for s in done.values() for name in s.drafters} == {"right", "wrong"}
    for sample in done.values():
        names = list(sample.drafters)
        for number, (name, counts) in enumerate(sample.drafters.items(), 1):
            assert counts.accepted == (sample.draft_sources == number).sum() <= counts.drafted
            assert name != "right" or counts.accepted == counts.drafted
        assert ((sample.draft_sources > 0) == (sample.origins == 1)).all() and sample.draft_sources.max() <= len(names)
    stats = generator.stats()
    assert stats.drafted == sum(c.drafted for s in done.values() for c in s.drafters.values())


def test_rows_without_a_draft_are_not_sampled_and_a_proposal_without_sampled_rows_has_no_probabilities():
    q = torch.full((3, 2, 4), 0.25)
    tokens, lengths = np.array([[1, 2], [3, 0], [0, 0]]), np.array([2, 1, 0])
    proposal = checked(Proposal(tokens, lengths, q, sampled=np.array([True, False, True])), request(2, 2, 2), 4)
    assert proposal.sampled.tolist() == [True, False, False]
    assert proposal.probabilities.shape == (3, 2, 4)
    none = checked(Proposal(tokens, lengths, q, sampled=np.zeros(3, bool)), request(2, 2, 2), 4)
    assert none.probabilities is None and none.sampled is None


def test_mixed_drafts_are_joined_row_by_row():
    drawn = Proposal(np.array([[5, 6], [7, 8]]), np.array([2, 2]), torch.full((2, 2, VOCABULARY), 1 / VOCABULARY))
    copied = Proposal(np.array([[1, 2, 3], [1, 2, 3]]), np.array([3, 3]), matches=np.array([9, 4]))
    out = joined([drawn, copied], ["a", "b"], np.array([0, 1]), np.array([1, 3]))
    assert out.token_ids[0, 0] == 5 and out.token_ids[1].tolist() == [1, 2, 3] and out.lengths.tolist() == [1, 3]
    assert list(out.drafted_by) == ["a", "b"] and out.matches.tolist() == [0, 4]
    assert out.sampled.tolist() == [True, False] and out.probabilities.shape == (2, 3, VOCABULARY)
    nothing = joined([drawn, copied], ["a", "b"], np.array([-1, 1]), np.array([2, 2]))
    assert nothing.lengths.tolist() == [0, 2] and nothing.probabilities is None


def test_a_mix_of_sampled_and_copied_drafts_is_verified(folder):
    generator = NativeGenerator(folder, drafter=Both(Sampled(), SuffixAutomatonDrafter()), max_sequences=8)
    generator.add(group(samples=8, max_new_tokens=40))
    done = finish(generator)
    assert generator.stats().drafter_failures == 0
    assert {name for s in done.values() for name in s.drafters} == {"sampled", "suffix-automaton"}
