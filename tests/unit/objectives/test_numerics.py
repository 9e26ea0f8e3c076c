"""Infinities and missing values: what cannot be used is not trained, and poisons nothing."""

from dataclasses import replace

import pytest
import torch

from learner.pieces import BUILT_IN, trait
from learner.testing import random_batch, random_tokens
from tests.unit.objectives.scenes import assert_acts, built, objective

BROKEN = ["logp", "logp_old", "logp_behaviour", "entropy", "entropy_old", "logp_reference"]
PIECES = [(kind, name) for kind in ("surrogate", "gate", "regulariser") for name in BUILT_IN[kind]]


@pytest.mark.parametrize(("kind", "name"), PIECES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_token_with_a_broken_value_is_not_trained_and_the_others_are(kind, name, value):
    batch = random_batch()
    _, tokens = random_tokens(batch, 0)
    whole = built(name)
    assert_acts(whole, tokens)
    for field in BROKEN:
        leaf = tokens.logp.detach().clone()
        now = replace(tokens, entropy=tokens.entropy.detach(), nucleus_entropy=tokens.nucleus_entropy.detach())
        changed = getattr(now, field).detach().clone() if field != "logp" else leaf
        changed[4] = value
        now = replace(now, **{field: changed})
        leaf = now.logp.detach().clone().requires_grad_()
        now = replace(now, logp=leaf)
        loss, sums = whole.loss(now, whole.plans(replace(now, logp=leaf.detach())))
        assert loss.isfinite(), field
        assert all(total.isfinite() for total in sums.values()), field
        if not loss.requires_grad:
            continue
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert gradient.isfinite().all() and gradient[4] == 0, field
        if kind == "surrogate" and not trait(whole.surrogate, "sequence_ratio"):
            assert (gradient != 0).sum() > len(gradient) // 3


@pytest.mark.parametrize("name", sorted(BUILT_IN["surrogate"]))
def test_weight_zero_is_no_gradient_even_where_the_loss_is_huge(name):
    batch = random_batch()
    _, tokens = random_tokens(batch, 0)
    whole = objective(surrogate={"name": name})
    leaf = tokens.logp.detach().clone()
    old = tokens.logp_old.clone()
    old[3] = -1e30
    weights = tokens.weight.clone()
    weights[3] = 0.0
    now = replace(tokens, logp=leaf.requires_grad_(), logp_old=old, weight=weights)
    loss, _ = whole.loss(now, whole.plans(replace(now, logp=leaf.detach())))
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient.isfinite().all() and gradient[3] == 0


def test_no_correction_touches_anything_where_nothing_is_off_policy():
    """mu = pi_old: all weights are 1, nothing is rejected, whatever the composition."""
    batch = random_batch()
    same = replace(batch, logp_behaviour=batch.logp_old, age=torch.zeros_like(batch.age))
    names = ["veto", "geometric-mask", "product-mask", "rejection", "age-mask", "tis", "batch-normalisation"]
    weight, _ = objective(corrections=[{"name": name} for name in names]).weights(same)
    assert weight.tolist() == [1.0] * len(weight)
