"""Infinities and missing values: what cannot be used is not trained, and poisons nothing."""

import math
from dataclasses import replace

import pytest
import torch

from learner.pieces import BUILT_IN, trait
from learner.testing import random_batch, random_tokens
from learner.tokens import selected
from tests.unit.objectives.scenes import assert_acts, built, objective

BROKEN = [
    "logp", "logp_old", "logp_behaviour", "entropy", "entropy_old", "logp_reference", "nucleus_entropy",
    "expected_score", "advantage", "weight",
]  # fmt: skip
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


BATCH = ["logp_old", "logp_behaviour", "entropy_old", "attention_entropy", "advantage"]


def broken_at(batch, field, value, token=4):
    changed = getattr(batch, field).clone()
    changed[token] = value
    return replace(batch, **{field: changed})


@pytest.mark.parametrize("name", sorted(BUILT_IN["modulator"]))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("field", BATCH)
def test_a_broken_token_leaves_a_modulators_advantages_and_memory_as_without_it(name, value, field):
    batch = random_batch()
    whole, without = objective(modulators=[{"name": name}]), objective(modulators=[{"name": name}])
    others = torch.tensor([token for token in range(len(batch.sequence)) if token != 4])
    for step in range(2):
        now = replace(batch, step=step)
        found, metrics = whole.modulated(broken_at(now, field, value))
        expected, _ = without.modulated(selected(now, others))
        assert found.advantage[4] == 0
        torch.testing.assert_close(found.advantage[others], expected.advantage)
        assert all(map(math.isfinite, metrics.values()))
        assert whole.state() == without.state()
        assert all(math.isfinite(number) for state in whole.state().values() for number in state.values())


@pytest.mark.parametrize("proportional", [0.0, 0.5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_entropy_leaves_the_adaptive_coefficient_as_without_it(proportional, value):
    batch = random_batch()
    table = {"name": "adaptive-entropy", "target": 0.9, "proportional": proportional}
    whole, without = objective(regularisers=[table]), objective(regularisers=[table])
    whole.modulated(broken_at(batch, "entropy_old", value))
    without.modulated(selected(batch, torch.cat([torch.arange(4), torch.arange(5, len(batch.sequence))])))
    assert whole.state() == without.state() and 0 < whole.state()["2:adaptive-entropy"]["coefficient"] < 1


def test_a_batch_of_broken_tokens_only_leaves_controllers_as_they_were():
    batch = random_batch()
    whole = objective(
        modulators=[{"name": "entropic"}, {"name": "aepo"}],
        regularisers=[{"name": "adaptive-entropy", "proportional": 0.5}],
    )
    whole.modulated(batch)
    before = whole.state()
    found, _ = whole.modulated(replace(batch, entropy_old=torch.full_like(batch.entropy_old, float("nan"))))
    assert whole.state() == before and not found.advantage.any()


def test_a_controllers_memory_that_was_not_finite_is_forgotten():
    whole = objective(modulators=[{"name": "entropic"}])
    whole.restore({"1:entropic": {"integral": float("nan")}})
    assert whole.state() == {"1:entropic": {"integral": 0.0}}


@pytest.mark.parametrize("name", sorted(BUILT_IN["correction"]))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("field", BATCH)
def test_a_broken_token_weighs_nothing_and_spoils_no_other_sample(name, value, field):
    batch = random_batch()
    table = {"name": name, **{"geometric-mask": {"low": 0.5, "high": 2.0}}.get(name, {})}
    corrections = [table, {"name": "batch-normalisation"}] if name != "batch-normalisation" else [table]
    whole = objective(corrections=corrections)
    weight, metrics = whole.weights(broken_at(batch, field, value))
    assert weight[4] == 0 and weight.isfinite().all() and all(map(math.isfinite, metrics.values()))
    kept = weight != 0
    elsewhere = batch.sequence != batch.sequence[4]
    assert torch.equal(kept[elsewhere], (whole.weights(batch)[0] != 0)[elsewhere]) and kept.any()
    assert float(weight[kept].mean()) == pytest.approx(1.0)


def test_a_weight_that_is_not_a_number_does_not_reach_the_corrections_after_it():
    batch = random_batch()
    whole = objective(corrections=[{"name": f"{__name__}:nothing_at_first"}, {"name": "batch-normalisation"}])
    weight, _ = whole.weights(batch)
    assert weight[0] == 0 and (weight[1:] == 1).all()


def nothing_at_first(weight, batch):
    return torch.cat([weight[:1] * float("nan"), weight[1:]])


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
    names = [
        "veto",
        "geometric-mask",
        "product-mask",
        "rejection",
        "age-mask",
        "token-mask",
        "tis",
        "batch-normalisation",
    ]
    weight, _ = objective(corrections=[{"name": name} for name in names]).weights(same)
    assert weight.tolist() == [1.0] * len(weight)
