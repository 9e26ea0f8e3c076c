"""Off-policy corrections against the papers' numbers and loops over single tokens."""

import math
from dataclasses import replace

import pytest
import torch

from learner.composition import build_objective
from learner.pieces import BUILT_IN, build
from pipeline.config import load_config
from pipeline.errors import UsageError
from tests.unit.objectives.scenes import batch_of, objective, random_batch

RATIOS = [1.0, 0.4, 6.0, 0.9]


def weights(table, batch, before=None):
    before = torch.ones_like(batch.advantage) if before is None else before
    return build("correction", table)(before, batch)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"name": "tis"}, [1, 0.4, 2, 0.9]),
        ({"name": "tis", "floor": 0.5}, [1, 0.5, 2, 0.9]),
        ({"name": "tis", "level": "sequence"}, [2, 2, 2, 2]),  # product 2.16
        ({"name": "tis", "level": "sequence", "cap": 5}, [2.16] * 4),
        ({"name": "icepop"}, [1, 0, 0, 0.9]),
        ({"name": "icepop", "low": 0.0, "high": 5.0}, [1, 0.4, 0, 0.9]),
        ({"name": "mis"}, [2.16] * 4),
        ({"name": "mis", "high": 2.0}, [0] * 4),
        ({"name": "mis", "weight": "token"}, RATIOS),
        ({"name": "product-mask"}, [0] * 4),
        ({"name": "product-mask", "high": 2.2}, [1] * 4),
        ({"name": "geometric-mask"}, [0] * 4),  # geometric mean 1.212309
        ({"name": "geometric-mask", "high": 1.2124}, [1] * 4),
        ({"name": "geometric-mask", "high": 1.2122}, [0] * 4),
        ({"name": "rejection", "high": 0.8824}, [0] * 4),  # mean k3 0.882473
        ({"name": "rejection", "high": 0.8825}, [1] * 4),
        ({"name": "rejection", "level": "token", "high": 0.32}, [1, 1, 0, 1]),
        ({"name": "rejection", "level": "sequence-max", "high": 3.2}, [0] * 4),
        ({"name": "rejection", "level": "sequence-max", "high": 3.21}, [1] * 4),
        ({"name": "rejection", "level": "sequence-sum", "high": 3.53}, [1] * 4),
        ({"name": "rejection", "level": "sequence-sum", "high": 3.52}, [0] * 4),
        ({"name": "rejection", "level": "token", "estimator": "k2", "high": math.log(6) ** 2 / 2 - 0.01}, [1, 1, 0, 1]),
        ({"name": "token-mask"}, [1, 0, 0, 1]),
        ({"name": "token-mask", "low": 0.3}, [1, 1, 0, 1]),  # rho, not 1 / rho
        ({"name": "token-mask", "high": 6.1}, [1, 0, 1, 1]),
        ({"name": "veto"}, [1] * 4),
        ({"name": "veto", "low": 0.41}, [0] * 4),
        ({"name": "veto", "high": 5.9}, [0] * 4),
    ],
)
def test_the_published_vector(table, expected):
    found, _ = weights(table, batch_of(RATIOS))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_token_mask_stands_beside_token_weights_and_does_not_weigh_itself():
    whole = objective(corrections=[{"name": "token-mask"}, {"name": "tis", "cap": 1.5}])
    assert whole.weights(batch_of([1.0, 0.4, 1.8, 6.0, 0.9]))[0].tolist() == pytest.approx([1, 0, 1.5, 0, 0.9])
    overrides = ['objective.corrections=["token-mask", "tis"]']
    build_objective(load_config(None, overrides))
    with pytest.raises(UsageError, match="more than once"):
        build_objective(load_config(None, ['objective.corrections=["icepop", "tis"]']))


def test_the_geometric_mask_drops_the_published_sample():
    batch = batch_of([1.1, 0.9, 1.05])  # 1.012997
    for low, high, kept in ((0.99, 1.01, 0.0), (0.999, 1.002, 0.0), (0.99, 1.02, 1.0)):
        assert weights({"name": "geometric-mask", "low": low, "high": high}, batch)[0].tolist() == [kept] * 3


def test_asymmetric_bands_are_on_pi_old_over_mu_not_on_its_inverse():
    batch = batch_of([1.5, 1.5])
    assert weights({"name": "geometric-mask", "low": 0.99, "high": 1.6}, batch)[0].tolist() == [1, 1]
    assert weights({"name": "geometric-mask", "low": 0.6, "high": 1.01}, batch)[0].tolist() == [0, 0]
    assert weights({"name": "product-mask", "low": 0.99, "high": 2.3}, batch)[0].tolist() == [1, 1]
    assert weights({"name": "mis", "low": 0.9, "high": 2.3}, batch)[0].tolist() == pytest.approx([2.25, 2.25])


def test_sequence_rules_look_at_each_sample_alone():
    batch = batch_of([1.0, 1.0, 6.0, 1e-5, 0.9], sequence=[0, 0, 1, 2, 2])
    assert weights({"name": "product-mask"}, batch)[0].tolist() == [1, 1, 0, 0, 0]
    assert weights({"name": "veto"}, batch)[0].tolist() == [1, 1, 1, 0, 0]
    assert weights({"name": "veto"}, batch)[1]["vetoed_samples"] == pytest.approx(1 / 3)


def test_the_age_mask_counts_publications():
    batch = replace(batch_of([1.0] * 4), age=torch.tensor([0, 8, 9, 20]))
    assert weights({"name": "age-mask"}, batch)[0].tolist() == [1, 1, 0, 0]


def test_batch_normalisation_has_mean_one_over_what_is_kept():
    batch = batch_of([1.0] * 5, sequence=[0, 0, 1, 1, 2])
    before = torch.tensor([1.0, 3.0, 0.0, 2.0, 0.0])
    assert weights({"name": "batch-normalisation"}, batch, before)[0].tolist() == pytest.approx([0.5, 1.5, 0, 1, 0])
    by_sample, _ = weights({"name": "batch-normalisation", "level": "sequence"}, batch, before)
    assert by_sample.tolist() == pytest.approx([0.5, 1.5, 0, 1, 0])  # samples have means 2 and 2
    assert weights({"name": "batch-normalisation"}, batch, torch.zeros(5))[0].tolist() == [0] * 5


def test_corrections_multiply_in_their_order():
    batch = batch_of([1.0, 0.4, 0.9, 1.4, 1.2], sequence=[0, 0, 1, 1, 1])
    whole = objective(corrections=[
        {"name": "veto", "low": 0.5}, {"name": "icepop", "low": 0.5, "high": 1.3}, {"name": "batch-normalisation"},
    ])  # fmt: skip
    found, metrics = whole.weights(batch)
    kept = torch.tensor([0, 0, 0.9, 0, 1.2])  # the first sample is vetoed, 1.4 is outside the band
    torch.testing.assert_close(found, kept / 1.05)
    assert metrics["batch-normalisation/mean"] == pytest.approx(1.05)
    assert metrics["veto/tokens_kept"] == pytest.approx(3 / 5)


@pytest.mark.parametrize("name", sorted(BUILT_IN["correction"]))
def test_infinite_and_missing_log_probs_give_finite_weights(name):
    batch = random_batch()
    broken = torch.tensor([torch.inf, -torch.inf, torch.nan])
    for field in ("logp_behaviour", "logp_old"):
        values = getattr(batch, field).clone()
        values[:3] = broken
        found, metrics = weights({"name": name}, replace(batch, **{field: values}))
        assert found.isfinite().all() and all(math.isfinite(value) for value in metrics.values())
        assert not found.requires_grad


def test_a_token_without_a_log_prob_has_weight_zero_whatever_the_floor():
    batch = batch_of([1.0, 1.0])
    batch.logp_behaviour[1] = torch.nan
    assert weights({"name": "tis", "floor": 0.5}, batch)[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "table",
    [
        {"name": "tis", "floor": 1.5, "cap": 2},
        {"name": "icepop", "low": 1.1},
        {"name": "mis", "high": 0.5},
        {"name": "geometric-mask", "low": 1.01, "high": 1.02},
        {"name": "product-mask", "low": 1.5},
    ],
)
def test_bands_without_one_are_refused(table):
    with pytest.raises(UsageError, match="1"):
        build("correction", table)


def test_an_interpolated_proximal_policy_lies_between_mu_and_pi_by_version():
    from tests.unit.objectives.scenes import tokens_of

    whole = objective(proximal="interpolate", corrections=[{"name": "tis", "cap": 1.5}])
    tokens = tokens_of([1.0] * 3, [1.0] * 3, logp=[-1.0, -1.0, -1.0], logp_behaviour=[-2.0, -2.0, -1.2],
                       age=[0, 1, 4], sampler=[0, 0, 0])  # fmt: skip
    found = whole.with_proximal(tokens)
    # log pi_old = log mu + age / (age + 1) (log pi - log mu): age 0 is mu itself
    assert found.logp_old.tolist() == pytest.approx([-2.0, -1.5, -1.2 + 0.8 * 0.2])
    assert found.weight.tolist() == pytest.approx([1.0, 1.5, math.exp(0.8 * 0.2)])
    assert not found.logp_old.requires_grad and not found.weight.requires_grad
