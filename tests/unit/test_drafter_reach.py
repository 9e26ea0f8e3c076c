"""What a drafter cannot do: change what generation reads, end the engine, or propose what is no proposal."""

import sys

import numpy as np
import pytest

from benchmarks.exactness_suite import rollouts
from benchmarks.exactness_suite.drafters import Overwriting
from benchmarks.exactness_suite.generators import GENERATORS
from benchmarks.exactness_suite.model import random_checkpoint
from drafters.base import BaseDrafter, DraftRequest, Proposal, SequenceStart
from drafters.guard import BadProposal, Guard, checked
from drafters.testing import check_past_alone, check_ragged_batches
from pipeline.engine.native.drafting import Drafting
from pipeline.engine.native.generator import NativeGenerator
from tests.unit.generation import Scripted, finish, group, texts
from tests.unit.tiny_models import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def request(*budgets):
    return DraftRequest(list(range(len(budgets))), np.array(budgets), np.ones(len(budgets), np.float32))


class Writing(Scripted):
    """Writes into one of the arrays that it is given."""

    name = "writing"

    def __init__(self, where):
        super().__init__(lambda start, emitted, budget: [3] * budget)
        self.where = where

    def begin(self, sequences):
        super().begin(sequences)
        if self.where == "prompt":
            sequences[0].prompt_ids[:] = 0

    def observe(self, verified):
        super().observe(verified)
        for where in ("accepted", "starts"):
            if self.where == where:
                getattr(verified, where)[:] = 0
        if self.where == "emitted":
            verified.emitted[0][:] = 0


@pytest.mark.parametrize("where", ["prompt", "emitted", "accepted", "starts"])
def test_what_a_drafter_is_shown_is_read_only(folder, where):
    plain, events = NativeGenerator(folder, max_sequences=2), []
    generator = NativeGenerator(folder, drafter=Writing(where), max_sequences=2, on_event=events.append)
    for g in (plain, generator):
        g.add(group(samples=4))
    assert texts(finish(generator)) == texts(finish(plain))
    assert events == ["drafter writing is switched off after ValueError: assignment destination is read-only"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = random_checkpoint(tmp_path_factory.mktemp("tiny"), rollouts.VOCABULARY, sharpness=0.6, seed=1)
    return path, rollouts.JointLaw(path)


def test_overwriting_what_is_shown_moves_nothing_and_would_be_caught(tiny, monkeypatch):
    def checks():
        found = list(rollouts.overwriting_checks(GENERATORS["native"], tiny[1], tiny[0], 1500, 7))
        return min(c.value for c in found if c.bound is None), [
            c for c in found if c.bound is not None and not c.passed
        ]

    assert checks()[0] > 1e-4 and not checks()[1]

    def reachable(self, s):
        return SequenceStart(s.id, s.request.prompt_ids, s.group, s.temperature, s.seed)

    monkeypatch.setattr(Drafting, "_start_of", reachable)
    assert checks()[0] < 1e-8


def test_the_overwriting_drafter_writes_indeed():
    start, asked = SequenceStart(0, np.array([5, 6]), 0, 1.0, 0), request(3)
    drafter = Overwriting()
    drafter.begin([start])
    drafter.propose(asked)
    assert start.prompt_ids.tolist() == [0, 0] and asked.budgets.tolist() == [0]


class Raising(BaseDrafter):
    """Raises its own budgets and uses them."""

    name = "raising"

    def propose(self, request):
        request.budgets[:] = 8
        assert isinstance(request.ids, tuple)  # which cannot be changed
        return Proposal(np.full((len(request.budgets), 8), 5, np.int64), np.full(len(request.budgets), 8, np.int64))


def test_a_drafter_is_held_to_the_budgets_that_it_was_given():
    events, asked = [], request(2, 1)
    assert Guard(Raising(), 10, events.append).propose(asked).lengths.tolist() == [0, 0]
    assert events == ["drafter raising is switched off after BadProposal: lengths [8, 8] where budgets are [2, 1]"]
    assert asked.budgets.tolist() == [2, 1] and asked.ids == [0, 1]


def test_a_drafter_cannot_end_the_engine(folder):
    class Leaving(BaseDrafter):
        name = "leaving"

        def propose(self, request):
            sys.exit(3)

    events = []
    generator = NativeGenerator(folder, drafter=Leaving(), max_sequences=2, on_event=events.append)
    generator.add(group(samples=2))
    assert len(finish(generator)) == 2
    assert events == ["drafter leaving is switched off after SystemExit: 3"]


def sound(**changes):
    parts = {"token_ids": np.array([[1, 2], [3, 0]]), "lengths": np.array([2, 1])}
    return Proposal(**{**parts, **changes})


ONES = np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    ("proposal", "said"),
    [
        (None, "propose gave NoneType, not drafters.base.Proposal"),
        (sound(token_ids=[[1, 2], [3, 0]]), "token_ids is list, not a numpy array"),
        (sound(lengths=(2, 1)), "lengths is tuple, not a numpy array"),
        (sound(lengths=None), "lengths is NoneType, not a numpy array"),
        (sound(probabilities=ONES), "probabilities is ndarray, not a torch tensor"),
        (sound(matches=np.array([1, -5])), "matches are negative"),
        (sound(matches=np.array([1.0, 2.0])), "matches are float64"),
        (sound(confidences=np.float32([[0.5, np.nan], [1, 1]])), "confidence is no number between 0 and 1"),
        (sound(confidences=2 * ONES), "confidence is no number between 0 and 1"),
        (sound(confidences=np.ones((2, 2), np.int64)), "confidences are int64"),
    ],
)
def test_what_is_no_proposal_is_said_in_words(proposal, said):
    with pytest.raises(BadProposal, match=said):
        checked(proposal, request(2, 2), 10)


def test_padding_may_hold_anything():
    confidences = np.float32([[0.5, 1], [1, np.nan]])
    found = checked(sound(confidences=confidences, matches=np.array([0, 7], np.int32)), request(2, 2), 10)
    assert found.matches.tolist() == [0, 7] and found.confidences[0].tolist() == [0.5, 1]


def test_the_kit_finds_writers():
    with pytest.raises(ValueError, match="read-only"):
        check_ragged_batches(lambda: Writing("emitted"))

    class Shortening(BaseDrafter):
        name = "shortening"

        def propose(self, request):
            np.minimum(request.budgets, 0, out=request.budgets)
            return Proposal.empty(len(request.ids))

    with pytest.raises(AssertionError, match="writes into the request"):
        check_past_alone(Shortening)
