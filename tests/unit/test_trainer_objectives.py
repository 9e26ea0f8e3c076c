"""The trainer's side of an objective: where pi_old comes from, references, planners, and what is remembered."""

import math

import numpy as np
import pytest
import torch
from msgspec import structs

from learner.logprobs import pack_logprobs
from learner.objective import Objective
from learner.packing import pack
from learner.trainer import Trainer
from pipeline.config.types import LearnerSection, ObjectiveSection
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from tests.unit.learner_samples import batch, tiny_folder, tiny_policy

BARE = {"corrections": [], "gates": []}


def trainer_of(folder, section, reference=None, **options):
    learner = LearnerSection(**{"micro_batch_tokens": 64, "learning_rate": 1e-2, "minibatches": 2, **options})
    return Trainer(tiny_policy(folder), Objective.from_config(ObjectiveSection(**section)), learner, 1.0,
                   reference=reference, max_response_tokens=16)  # fmt: skip


def passes(trainer, groups, monkeypatch):
    """Forward passes without gradient and with, and the metrics of the step."""
    counts = {"no_grad": 0, "grad": 0}

    def counted(*arguments, **keywords):
        counts["grad" if torch.is_grad_enabled() else "no_grad"] += 1
        return pack_logprobs(*arguments, **keywords)

    monkeypatch.setattr("learner.trainer.pack_logprobs", counted)
    return counts, trainer.train(groups, publication=2)


def fresh(folder, noise=0.0, version=2):
    """Groups whose log-probs are the policy's own."""
    policy, groups, rng = tiny_policy(folder), batch(seed=3, version=version), np.random.default_rng(0)
    for sample in (sample for group in groups for sample in group):
        sample.roles[:] = 0
        (row,) = pack([sample], [0], 1024, "cpu")
        with torch.no_grad():
            values = pack_logprobs(policy, row, 1.0)
        sample.logprobs = (values.logp.numpy() + noise * rng.normal(size=len(values.logp))).astype(np.float32)
        sample.entropies = values.entropy.numpy()
    return groups


def test_the_engines_log_probs_save_a_forward_pass_and_mismatch_is_measured_all_the_same(tmp_path, monkeypatch):
    folder = tiny_folder(tmp_path / "model")
    results = {}
    for proximal in ("recompute", "behaviour", "interpolate"):
        trainer = trainer_of(folder, {**BARE, "proximal": proximal})
        results[proximal] = passes(trainer, fresh(folder, noise=0.05), monkeypatch)
    packs = results["recompute"][0]["grad"]
    assert results["recompute"][0] == {"no_grad": packs, "grad": packs}
    for proximal in ("behaviour", "interpolate"):
        counts, metrics = results[proximal]
        assert counts == {"no_grad": 0, "grad": packs}
        # over the first mini-batch only, before its optimiser step
        assert metrics["mismatch_k3"] == pytest.approx(0.05**2 / 2, rel=0.5)
        assert metrics["entropy"] == pytest.approx(results["recompute"][1]["entropy"], rel=0.05)
    assert results["recompute"][1]["mismatch_k3"] == pytest.approx(0.05**2 / 2, rel=0.5)


def test_without_drift_it_does_not_matter_where_pi_old_comes_from(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    weights = {}
    for proximal in ("recompute", "behaviour", "interpolate"):
        trainer = trainer_of(folder, {**BARE, "proximal": proximal}, minibatches=1)
        trainer.train(fresh(folder), publication=2)
        weights[proximal] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    for proximal in ("behaviour", "interpolate"):
        assert float((weights[proximal] - weights["recompute"]).norm()) < 1e-3 * float(weights["recompute"].norm())


def test_in_the_behaviour_mode_ratios_hold_the_whole_drift(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    clipped = {}
    for proximal in ("recompute", "behaviour"):
        trainer = trainer_of(folder, {**BARE, "proximal": proximal}, minibatches=1)
        clipped[proximal] = trainer.train(fresh(folder, noise=0.8), publication=2)["clip_fraction"]
    assert clipped["recompute"] == 0 and clipped["behaviour"] > 0.1


def test_entropy_ratios_use_the_engines_entropies_in_the_behaviour_mode(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    groups = fresh(folder)
    section = {"corrections": [], "proximal": "behaviour"}
    assert trainer_of(folder, section, minibatches=1).train(groups, publication=2)["entropy_ratio_kept"] == 1.0
    for sample in groups[0]:
        sample.entropies = sample.entropies * 1.2
    kept = trainer_of(folder, section, minibatches=1).train(groups, publication=2)["entropy_ratio_kept"]
    share = sum(len(s.token_ids) for s in groups[0]) / sum(len(s.token_ids) for g in groups for s in g)
    assert kept == pytest.approx(1 - share)


def test_a_plan_costs_a_pass_from_the_second_mini_batch_on(tmp_path, monkeypatch):
    folder = tiny_folder(tmp_path / "model")
    trainer = trainer_of(folder, {"corrections": [], "gates": [{"name": "high-entropy"}]})
    counts, metrics = passes(trainer, fresh(folder), monkeypatch)
    assert counts["grad"] < counts["no_grad"] < 2 * counts["grad"]
    assert metrics["high-entropy/kept"] == pytest.approx(0.2, abs=0.05)
    trainer = trainer_of(folder, {**BARE, "regularisers": [{"name": "positive-nll"}]})
    counts, _ = passes(trainer, fresh(folder), monkeypatch)
    assert counts["no_grad"] == counts["grad"]  # its plan looks at rewards only


def test_the_divergence_from_the_reference_starts_at_zero_and_grows(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    section = {**BARE, "regularisers": [{"name": "kl", "coefficient": 0.1}]}
    with pytest.raises(UsageError, match="reference_path"):
        trainer_of(folder, section)
    trainer = trainer_of(folder, section, tiny_policy(folder), minibatches=1)
    rows = [trainer.train(fresh(folder), publication=2) for _ in range(3)]
    assert rows[0]["kl/estimate"] == pytest.approx(0.0, abs=1e-6)
    assert rows[0]["kl/estimate"] < rows[1]["kl/estimate"] < rows[2]["kl/estimate"]


def test_age_conditioned_divergence_grows_with_age(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    groups = fresh(folder)
    for age, group in enumerate(groups):
        for sample in group:
            sample.versions[:] = 2 - min(age, 2)
            sample.logprobs = sample.logprobs - np.float32(0.1 * age)
    metrics = trainer_of(folder, BARE).train(groups, publication=2)
    expected = [math.expm1(x) - x for x in (0.0, 0.1)]
    assert [metrics["k3/age_0"], metrics["k3/age_1"]] == pytest.approx(expected, abs=1e-6)
    assert metrics["k3/age_2_3"] > metrics["k3/age_1"] and "k3/age_4_up" not in metrics


def test_an_explored_sample_is_evaluated_at_its_own_temperature(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    policy, groups = tiny_policy(folder), fresh(folder)
    for sample in groups[0]:
        sample.header = structs.replace(sample.header, sampling=SamplingParams(temperature=1.3))
        (row,) = pack([sample], [0], 1024, "cpu")
        with torch.no_grad():
            sample.logprobs = pack_logprobs(policy, row, 1.3).logp.numpy()
    metrics = trainer_of(folder, {**BARE, "modulators": [{"name": "aepo"}]}).train(groups, publication=2)
    assert metrics["mismatch_k3"] < 1e-9
    share = sum(len(s.token_ids) for s in groups[0]) / sum(len(s.token_ids) for g in groups for s in g)
    assert metrics["aepo/explored"] == pytest.approx(share)


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "prompt-mean", "constant-horizon"])
def test_the_losses_of_micro_batches_add_up_whatever_the_aggregation(tmp_path, aggregation):
    folder = tiny_folder(tmp_path / "model")
    section = {**BARE, "aggregation": {"name": aggregation}, "surrogate": {"name": "reinforce"}}
    losses = [
        trainer_of(folder, section, minibatches=1, micro_batch_tokens=size).train(fresh(folder), 2)["loss"]
        for size in (16, 1024)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_empty_batch_and_a_batch_without_tokens_train_nothing(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    names = [{"name": name} for name in ("erc", "clip-cov", "clip-v", "steer")]
    section = {"gates": names, "regularisers": [{"name": "siren"}], "modulators": [{"name": "empg"}]}
    trainer = trainer_of(folder, section)
    for groups in ([], [[]]):
        metrics = trainer.train(groups, publication=0)
        assert metrics["loss"] == 0.0 and metrics["tokens_trained"] == 0
        assert all(value is None or math.isfinite(value) for value in metrics.values())
