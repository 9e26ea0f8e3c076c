"""Drafters that misbehave, weights that change or break."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from drafters.base import Needs, Proposal
from drafters.suffix_automaton import SuffixAutomatonDrafter
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import RunFailed, UsageError
from tests.unit.generation import Sampled, Scripted, finish, group, hostile, texts
from tests.unit.tiny_models import VOCABULARY, reference, reference_logits, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("other"), seed=5)


def make(folder, drafter=None, **options):
    return NativeGenerator(folder, drafter=drafter, **{"max_sequences": 8, "stop_token_ids": (), **options})


REQUESTS = (group(0, samples=3, max_new_tokens=24), group(1, prompt=[4, 4, 4], samples=3, temperature=0.5))


class Faulty(Scripted):
    """Well-behaved until its fifth proposal."""

    name = "faulty"

    def __init__(self, fault, where="propose"):
        super().__init__(lambda start, emitted, budget: [3] * budget)
        self.fault, self.where, self.calls, self.after = fault, where, 0, 0

    def propose(self, request):
        self.calls += 1
        if self.calls < 5 or self.where != "propose":
            return super().propose(request)
        self.after += 1
        return self.fault(super().propose(request), request)

    def observe(self, verified):
        if self.where == "observe" and self.calls == 5:
            self.after += 1
            self.fault(None, None)
        super().observe(verified)


def raising(proposal, request):
    raise KeyError("lost a sequence")


def changed(**changes):
    def fault(proposal, request):
        fields = {name: getattr(proposal, name) for name in ("token_ids", "lengths", "probabilities", "parents")}
        return Proposal(**{**fields, **{name: change(fields, request) for name, change in changes.items()}})

    return fault


def uniform_law(fields, scale):
    rows, width = fields["token_ids"].shape
    return torch.full((rows, width, VOCABULARY), scale / VOCABULARY)


FAULTS = {
    "raises": raising,
    "returns nothing": lambda proposal, request: None,
    "too few rows": changed(token_ids=lambda f, r: f["token_ids"][1:]),
    "token past the vocabulary": changed(token_ids=lambda f, r: f["token_ids"] + VOCABULARY),
    "negative token": changed(token_ids=lambda f, r: f["token_ids"] - 10),
    "float tokens": changed(token_ids=lambda f, r: f["token_ids"].astype(np.float64)),
    "over budget": changed(
        token_ids=lambda f, r: np.zeros((len(r.ids), 50), np.int64), lengths=lambda f, r: r.budgets + 1
    ),
    "longer than its array": changed(token_ids=lambda f, r: f["token_ids"][:, :1]),
    "negative length": changed(lengths=lambda f, r: f["lengths"] - 100),
    "trees": changed(parents=lambda f, r: f["token_ids"]),
    "probabilities of another shape": changed(probabilities=lambda f, r: torch.ones(1, 1, 1)),
    "probabilities that do not sum to 1": changed(probabilities=lambda f, r: uniform_law(f, 2.0)),
    "probabilities that are not numbers": changed(probabilities=lambda f, r: uniform_law(f, float("nan"))),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_drafter_is_switched_off_once_and_the_text_stays(folder, name):
    plain = make(folder)
    drafter, events = Faulty(FAULTS[name]), []
    generator = make(folder, drafter, on_event=events.append)
    for request in REQUESTS:
        plain.add(request)
        generator.add(request)
    assert texts(finish(generator)) == texts(finish(plain))
    assert drafter.after == 1 and generator.stats().drafter_failures == 1
    assert len(events) == 1 and events[0].startswith("drafter faulty is switched off after ")


def test_failing_elsewhere_switches_off_too_and_warns_by_default(folder):
    drafter = Faulty(raising, where="observe")
    generator = make(folder, drafter)
    generator.add(REQUESTS[0])
    with pytest.warns(UserWarning, match="faulty is switched off after KeyError: 'lost a sequence'"):
        finish(generator)
    assert drafter.after == 1 and drafter.calls == 5


def test_probability_zero_for_its_own_draft_is_refused(folder):
    class Impossible(Sampled):
        def propose(self, request):
            proposal = super().propose(request)
            q = torch.zeros_like(proposal.probabilities)
            q[..., 0] = 1.0
            return Proposal(np.ones_like(proposal.token_ids), request.budgets, q.expand(-1, 8, -1)[:, :1])

    events = []
    generator = make(folder, Impossible(), max_draft_tokens=1, on_event=events.append)
    generator.add(group())
    finish(generator)
    assert "give the token itself none" in events[0]


class Listening(SuffixAutomatonDrafter):
    needs = Needs.NOTHING

    def __init__(self):
        super().__init__()
        self.versions = []

    def weights_changed(self, version):
        self.versions.append(version)


def test_weights_change_in_flight(folder, other):
    drafter = Listening()
    before, generator = make(folder), make(folder, drafter, max_sequences=4, max_draft_tokens=2)
    for g in (before, generator):
        g.add(group(0, samples=3, max_new_tokens=20))
        g.add(group(1, prompt=[8, 8, 2], samples=3, max_new_tokens=20))
    generator.load_weights(folder, 6)
    for _ in range(3):
        assert generator.step() == []
    generator.load_weights(other, 7)
    assert generator.version == 7 and drafter.versions == [6, 7]
    old, new = finish(before), finish(generator)

    model = reference(other)
    for (g, sample), finished in new.items():
        versions = finished.versions.tolist()
        assert versions == sorted(versions) and set(versions) <= {6, 7}
        begun = versions.count(6)
        assert finished.kv_kept_across_update == (begun > 0)
        if begun:
            assert finished.token_ids[:begun].tolist() == old[g, sample].token_ids[:begun].tolist()
            assert finished.token_ids.tolist() != old[g, sample].token_ids.tolist()
        else:
            # Started after the update: the prompt is not copied from a sibling that computed it with the old weights.
            prompt = [8, 8, 2]
            logits = reference_logits(model, prompt + finished.token_ids.tolist())[len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(finished.token_ids)[:, None])[:, 0]
            np.testing.assert_allclose(finished.logprobs, expected.numpy(), atol=1e-4)
    assert {s.versions[0] for s in new.values()} == {6, 7}
    assert {s.versions[0] for key, s in new.items() if key[0] == 1} == {6, 7}


def test_loading_the_same_weights_changes_no_text(folder):
    plain, generator = make(folder), make(folder, hostile())
    for request in REQUESTS:
        plain.add(request)
        generator.add(request)
    for version in range(4):
        generator.step()
        generator.load_weights(folder, version)
    done = finish(generator)
    assert texts(done) == texts(finish(plain))
    assert all(s.kv_kept_across_update and s.versions[-1] == 3 for s in done.values())


def test_a_bad_publication_is_refused_and_generation_goes_on(folder, other, tmp_path):
    plain, generator = make(folder), make(folder)
    plain.add(REQUESTS[0])
    generator.add(REQUESTS[0])
    generator.step()
    weights = load_file(other / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="up_proj"):
        generator.load_weights(tmp_path, 3)
    done = finish(generator)
    assert texts(done) == texts(finish(plain)) and generator.version == -1
    assert not done[0, 0].kv_kept_across_update


def test_weights_that_are_not_numbers_end_the_run(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, tmp_path / "model.safetensors")
    generator = make(folder, SuffixAutomatonDrafter())
    generator.add(REQUESTS[0])
    generator.load_weights(tmp_path, 4)
    with pytest.raises(RunFailed, match="publication 4"):
        generator.step()
