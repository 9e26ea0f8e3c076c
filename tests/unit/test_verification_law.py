"""Exact enumeration: the joint law of what is emitted, on models small enough to write down.

The random numbers are integrated out by cells: the harness works out, with numpy and from the rules' definitions, the
intervals in which each number leads to one outcome, calls the production code at both ends of every cell, and weights
each call by half the cell. A threshold in the wrong place, or any wrong rule, puts weight on the wrong sequence.
"""

import itertools

import numpy as np
import pytest
import torch

from pipeline.sampling import verification
from pipeline.sampling.verification import TokenUniforms, verify

INSET = 1e-13


class TableModel:
    """p(. | prefix) for every prefix of up to K tokens over V, some entries zero."""

    def __init__(self, seed, vocabulary, depth, zeros=0.2):
        rng = np.random.default_rng(seed)
        self.vocabulary, self.table = vocabulary, {}
        for n in range(depth + 1):
            for prefix in itertools.product(range(vocabulary), repeat=n):
                p = rng.dirichlet(np.ones(vocabulary)) * (rng.random(vocabulary) > zeros)
                p[rng.integers(vocabulary)] += 0.1
                self.table[prefix] = p / p.sum()

    def __getitem__(self, prefix):
        return self.table[tuple(prefix)]

    def law(self, length):
        sequences = itertools.product(range(self.vocabulary), repeat=length)
        return {s: float(np.prod([self[s[:i]][s[i]] for i in range(length)])) for s in sequences}


def ends(low, high):
    """Both ends of a cell of random numbers, half its weight each."""
    if high - low <= 4 * INSET:
        return []
    return [(low + INSET, (high - low) / 2), (high - INSET, (high - low) / 2)]


def middle(low, high):
    return [((low + high) / 2, high - low)] if high - low > 4 * INSET else []


def draw_cells(weights, points=ends):
    edges = np.concatenate([[0], np.cumsum(weights) / np.sum(weights)])
    return [point for low, high in itertools.pairwise(edges) for point in points(low, high)]


class Cases:
    """Calls to make, as rows of one batch: draft, random numbers, weight."""

    def __init__(self, model, proposal, length):
        self.model, self.proposal, self.length = model, proposal, length
        self.drafts, self.sample, self.accept, self.residual, self.weight = [], [], [], [], []

    def add(self, draft, sample, accept, residual, weight):
        for kept, new in zip(
            (self.drafts, self.sample, self.accept, self.residual, self.weight),
            (draft, sample, accept, residual, weight),
            strict=True,
        ):
            kept.append(new)

    def law(self):
        """Law of the first `length + 1` tokens: what is emitted, continued by the model itself."""
        drafts, lengths = np.array(self.drafts, np.int64), np.full(len(self.drafts), self.length)
        p = np.array([[self.model[d[:i]] for i in range(self.length + 1)] for d in self.drafts])
        q = None
        if self.proposal is not None:
            q = torch.tensor(np.array([[self.proposal[d[:i]] for i in range(self.length)] for d in self.drafts]))
        numbers = (torch.tensor(np.array(n, np.float64).ravel()) for n in (self.sample, self.accept, self.residual))
        with np.errstate(divide="ignore"):
            logits = torch.tensor(np.log(p)).flatten(0, 1)
        out = verify(logits, drafts, lengths, torch.ones(len(drafts)), TokenUniforms(*numbers), q)
        law = dict.fromkeys(self.model.law(self.length + 1), 0.0)
        for tokens, accepted, weight in zip(out.tokens.tolist(), out.accepted.tolist(), self.weight, strict=True):
            emitted = tuple(tokens[: accepted + 1])
            for rest in itertools.product(range(self.model.vocabulary), repeat=self.length - accepted):
                sequence = emitted + rest
                tail = [self.model[sequence[:i]][sequence[i]] for i in range(accepted + 1, self.length + 1)]
                law[sequence] += weight * float(np.prod(tail))
        return law


def deterministic_error(model, length, points=ends):
    """Largest error of the law over all drafts, each draft being fixed."""
    worst, target = 0.0, model.law(length + 1)
    for draft in itertools.product(range(model.vocabulary), repeat=length):
        cases = Cases(model, None, length)
        cells = [draw_cells(model[draft[:i]], points) for i in range(length + 1)]
        for combination in itertools.product(*cells):
            numbers = [u for u, _ in combination]
            cases.add(draft, numbers, numbers, numbers, float(np.prod([w for _, w in combination])))
        law = cases.law()
        worst = max(worst, *(abs(law[s] - target[s]) for s in target))
    return worst


def sampled_error(model, proposal, length, stated=None):
    """Error of the law when the draft is drawn from `proposal`, and `stated` is what verification is told of it."""
    cases, neutral = Cases(model, stated or proposal, length), 0.5
    for draft in itertools.product(range(model.vocabulary), repeat=length):
        chance = float(np.prod([proposal[draft[:i]][draft[i]] for i in range(length)]))
        if chance == 0:
            continue
        p, q = [model[draft[:i]] for i in range(length + 1)], [proposal[draft[:i]] for i in range(length)]
        limits = [min(1.0, p[i][draft[i]] / q[i][draft[i]]) for i in range(length)]
        for accepted in range(length + 1):
            tests = [ends(0, limits[i]) for i in range(accepted)]
            rest = np.maximum(p[accepted] - q[accepted], 0) if accepted < length else p[accepted]
            if accepted < length:
                tests.append(ends(limits[accepted], 1))
            if not all(tests):
                continue
            for *decisions, (last, weight) in itertools.product(*tests, draw_cells(rest)):
                accept = [u for u, _ in decisions] + [neutral] * (length + 1 - len(decisions))
                # The final draw is the residual's after a rejection, plain sampling's after a whole draft.
                residual = [last if i == accepted else neutral for i in range(length + 1)]
                total = chance * weight * float(np.prod([w for _, w in decisions]))
                cases.add(draft, residual, accept, residual, total)
    law, target = cases.law(), model.law(length + 1)
    return max(abs(law[s] - target[s]) for s in target)


@pytest.mark.parametrize(("vocabulary", "length", "points"), [(3, 2, ends), (2, 3, ends), (5, 2, ends), (4, 3, middle)])
def test_law_of_deterministic_drafts_is_the_targets(vocabulary, length, points):
    assert deterministic_error(TableModel(1, vocabulary, length), length, points) < 1e-12


@pytest.mark.parametrize(("vocabulary", "length"), [(3, 2), (2, 3), (5, 2), (4, 3)])
def test_law_of_sampled_drafts_is_the_targets(vocabulary, length):
    model, proposal = TableModel(2, vocabulary, length), TableModel(3, vocabulary, length)
    assert sampled_error(model, proposal, length) < 1e-12


def test_draft_from_the_target_itself_is_always_accepted():
    model = TableModel(4, 3, 2, zeros=0)
    assert sampled_error(model, model, 2) < 1e-12
    p = torch.tensor(np.array([model[()], model[(1,)], model[(1, 2)]]))
    almost_one = torch.full((3,), 1 - 1e-12, dtype=torch.float64)
    out = verify(
        p.log(), np.array([[1, 2]]), np.array([2]), torch.ones(1),
        TokenUniforms(almost_one, almost_one, almost_one), p[:2].unsqueeze(0),
    )  # fmt: skip
    assert out.accepted.tolist() == [2]


def test_enumeration_catches_a_skipped_residual(monkeypatch):
    monkeypatch.setattr(verification, "residual", lambda p, q: p)
    assert sampled_error(TableModel(2, 3, 2), TableModel(3, 3, 2), 2) > 1e-2


def test_enumeration_catches_a_wrong_temperature_on_one_side():
    model, proposal, stated = TableModel(2, 3, 2, zeros=0), TableModel(3, 3, 2, zeros=0), TableModel(3, 3, 2, zeros=0)
    stated.table = {prefix: q**2 / (q**2).sum() for prefix, q in proposal.table.items()}
    assert sampled_error(model, proposal, 2, stated) > 1e-2


def test_enumeration_catches_one_accepted_too_many(monkeypatch):
    honest = verification._Layout.leading
    monkeypatch.setattr(
        verification._Layout, "leading", lambda self, good: torch.minimum(honest(self, good) + 1, self.lengths)
    )
    assert sampled_error(TableModel(2, 3, 2), TableModel(3, 3, 2), 2) > 1e-2
    assert deterministic_error(TableModel(1, 3, 2), 2) > 1e-2


def test_enumeration_catches_a_biased_draw(monkeypatch):
    honest = verification.inverse_cdf

    monkeypatch.setattr(verification, "inverse_cdf", lambda weights, uniform: honest(weights, uniform * 0.9))
    assert deterministic_error(TableModel(1, 3, 2), 2) > 1e-2
