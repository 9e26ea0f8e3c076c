"""What a batch that was sampled from compressed caches reports."""

import math

import pytest
import torch

from learner.composition import build_objective, uncorrected_sampler
from learner.pieces import build
from learner.step_metrics import compressed_metrics
from pipeline.config import load_config
from pipeline.messages import Sampler
from tests.unit.objectives.scenes import batch_of


def test_only_compressed_tokens_are_measured():
    batch = batch_of([1.0, 0.5, 1.5, 100.0], sampler=torch.tensor([0, Sampler.COMPRESSED_KV, Sampler.COMPRESSED_KV, 0]))
    found = compressed_metrics(batch.logp_old, batch)
    assert found["compressed/fraction"] == 0.5
    assert found["compressed/ratio_mean"] == pytest.approx(1.0)
    assert (found["compressed/ratio_min"], found["compressed/ratio_max"]) == pytest.approx((0.5, 1.5))
    assert found["compressed/k3"] == pytest.approx((0.5 - 1 - math.log(0.5) + 1.5 - 1 - math.log(1.5)) / 2, rel=1e-5)
    assert compressed_metrics(batch.logp_old, batch_of([1.0, 2.0])) == {}


def test_a_veto_says_where_the_impossible_tokens_stood():
    batch = batch_of([1.0, 1.0, 1e-5, 1e-6, 1.0, 1.0], sequence=[0, 0, 0, 1, 1, 2])
    _, metrics = build("correction", {"name": "veto"})(torch.ones(6), batch)
    assert metrics["outlier_position"] == pytest.approx((2 + 0) / 2)
    assert metrics["vetoed_samples"] == pytest.approx(2 / 3)
    _, metrics = build("correction", {"name": "veto"})(torch.ones(2), batch_of([1.0, 1.0]))
    assert "outlier_position" not in metrics


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["objective.recipe=sparse-rl"], False),
        (["objective.recipe=dapo"], True),
        (["objective.recipe=dapo", "objective.proximal=behaviour"], False),
        (["objective.recipe=dapo", "engine.kv_compression.policy=none"], False),
    ],
)
def test_compression_that_nothing_corrects_is_said(overrides, warned):
    config = load_config(None, ["engine.kv_compression.policy=r-kv", *overrides])
    warning = uncorrected_sampler(build_objective(config), config)
    assert (warning is not None) == warned
    assert warning is None or "sparse-rl" in warning
