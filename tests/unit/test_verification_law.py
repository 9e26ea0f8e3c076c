"""Exact enumeration: the joint law of what is emitted, on models small enough to write down."""

import numpy as np
import pytest
import torch

from pipeline.sampling import verification
from pipeline.sampling.exactness import TableModel, law_error
from pipeline.sampling.target import plain_target
from pipeline.sampling.verification import TokenUniforms, verify

BOUND = 1e-12


@pytest.mark.parametrize(("vocabulary", "length"), [(3, 2), (2, 3), (5, 2)])
def test_law_of_deterministic_drafts_is_the_targets(vocabulary, length):
    assert law_error(TableModel(1, vocabulary, length), length, "deterministic") < BOUND


@pytest.mark.parametrize("rule", ["standard", "block"])
@pytest.mark.parametrize(("vocabulary", "length"), [(3, 2), (2, 3), (5, 2), (4, 3), (2, 1)])
def test_law_of_sampled_drafts_is_the_targets(vocabulary, length, rule):
    model, proposal = TableModel(2, vocabulary, length), TableModel(3, vocabulary, length)
    assert law_error(model, length, rule, proposal) < BOUND


@pytest.mark.parametrize("block", [False, True])
def test_draft_from_the_target_itself_is_always_accepted(block):
    model = TableModel(4, 3, 2, zeros=0)
    assert law_error(model, 2, "block" if block else "standard", model) < BOUND
    p = torch.tensor(np.array([model[()], model[(1,)], model[(1, 2)]]))
    almost_one = torch.full((3,), 1 - 1e-12, dtype=torch.float64)
    out = verify(
        plain_target(p.log(), torch.ones(3)), np.array([[1, 2]]), np.array([2]),
        TokenUniforms(almost_one, almost_one, almost_one), p[:2].unsqueeze(0), block=block,
    )  # fmt: skip
    assert out.accepted.tolist() == [2]


@pytest.mark.parametrize("rule", ["standard", "block"])
def test_enumeration_catches_a_skipped_residual(monkeypatch, rule):
    monkeypatch.setattr(verification, "residual", lambda p, q: p)
    assert law_error(TableModel(2, 3, 2), 2, rule, TableModel(3, 3, 2)) > 1e-2


@pytest.mark.parametrize("rule", ["standard", "block"])
def test_enumeration_catches_a_wrong_temperature_on_one_side(rule):
    model, proposal, stated = (TableModel(seed, 3, 2, zeros=0) for seed in (2, 3, 3))
    stated.table = {prefix: q**2 / (q**2).sum() for prefix, q in proposal.table.items()}
    assert law_error(model, 2, rule, proposal, stated) > 1e-2


def test_enumeration_catches_one_accepted_too_many(monkeypatch):
    honest = verification._Layout.leading
    monkeypatch.setattr(
        verification._Layout, "leading", lambda self, good: torch.minimum(honest(self, good) + 1, self.lengths)
    )
    assert law_error(TableModel(2, 3, 2), 2, "standard", TableModel(3, 3, 2)) > 1e-2
    assert law_error(TableModel(1, 3, 2), 2, "deterministic") > 1e-2


def test_enumeration_catches_a_block_accepted_token_by_token(monkeypatch):
    """The residual of block verification after the acceptance of the standard rule."""
    honest = verification._accept_block

    def accept(layout, p, q, p_x, q_x, numbers):
        _, scale = honest(layout, p, q, p_x, q_x, numbers)
        return layout.leading((numbers * q_x < p_x) & (layout.drafted >= 0)), scale

    monkeypatch.setattr(verification, "_accept_block", accept)
    assert law_error(TableModel(2, 3, 2), 2, "block", TableModel(3, 3, 2)) > 1e-3


def test_enumeration_catches_a_biased_draw(monkeypatch):
    honest = verification.inverse_cdf

    monkeypatch.setattr(verification, "inverse_cdf", lambda weights, uniform: honest(weights, uniform * 0.9))
    assert law_error(TableModel(1, 3, 2), 2, "deterministic") > 1e-2
