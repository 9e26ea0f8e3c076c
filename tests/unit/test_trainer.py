import copy
import math

import msgspec
import numpy as np
import pytest
import torch

from learner.objective import Objective
from learner.schedule import learning_rate
from learner.trainer import Trainer
from pipeline.config.types import LearnerSection, ObjectiveSection
from pipeline.errors import RunFailed, UsageError
from pipeline.messages import Sampler
from tests.unit.learner_samples import batch, tiny_folder, tiny_policy, trajectory, transformers_class


def trainer_of(model, *, objective=None, seed=0, **options):
    section = LearnerSection(**{"micro_batch_tokens": 64, "learning_rate": 1e-3, "max_grad_norm": 1e9, **options})
    return Trainer(model, Objective.from_config(objective or ObjectiveSection()), section, temperature=1.0, seed=seed)


def parameters_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def distributions(model, sample):
    """The stock model's distribution at each generated token of a sample, with the token: nothing packed."""
    ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.token_ids]).astype(np.int64))
    logits = model(ids[None], use_cache=False).logits[0]
    for position in np.flatnonzero(sample.roles == 0):
        at = len(sample.prompt_ids) + int(position)
        yield torch.distributions.Categorical(logits=logits[at - 1]), ids[at], float(sample.logprobs[position])


def loop_loss(now, old, groups, indices):
    """TIS-weighted, dual-clipped PPO with clip-higher and ERC, token mean: one token at a time."""
    samples = [(sample, group) for group in groups for sample in group]
    total, count = torch.zeros(()), 0
    for index in indices:
        sample, group = samples[index]
        rewards = [member.header.reward for member in group]
        average = sum(rewards) / len(rewards)
        deviation = math.sqrt(sum((r - average) ** 2 for r in rewards) / (len(rewards) - 1))
        advantage = (sample.header.reward - average) / (deviation + 1e-6)
        with torch.no_grad():
            before = [(d.log_prob(token).item(), d.entropy().item()) for d, token, _ in distributions(old, sample)]
        for (d, token, logp_mu), (logp_old, entropy_old) in zip(distributions(now, sample), before, strict=True):
            ratio = (d.log_prob(token) - logp_old).exp()
            gain = min(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage, key=lambda value: value.item())
            loss = -gain
            if advantage < 0 and loss.item() > -10 * advantage:
                loss = torch.tensor(-10.0 * advantage)
            loss = loss * min(math.exp(logp_old - logp_mu), 2.0)
            quotient = (d.entropy().item() + 1e-8) / (entropy_old + 1e-8)
            total = total + (loss if 0.95 < quotient < 1.05 else loss.detach())
            count += 1
    return total / count, count


def test_value_and_gradients_of_both_optimiser_steps_equal_a_loop_over_tokens(tmp_path):
    model = tiny_policy(tmp_path / "model")
    stock = transformers_class(True).from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    groups = batch(seed=1)
    trainer = trainer_of(model, minibatches=2, learning_rate=2e-2)
    minibatches = trainer._split([sample for group in groups for sample in group])
    seen = []

    def record(optimizer, args, kwargs):
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        seen.append((parameters_of(model), gradients))

    trainer.optimizer.register_step_pre_hook(record)
    metrics = trainer.train(groups, publication=0)

    total, tokens = 0.0, 0
    for (parameters, gradients), indices in zip(seen, minibatches, strict=True):
        now = copy.deepcopy(stock)
        now.load_state_dict(parameters, strict=False)
        loss, count = loop_loss(now, stock, groups, indices)
        loss.backward()
        total, tokens = total + loss.item() * count, tokens + count
        for name, parameter in now.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-6, rtol=2e-3, msg=name)
    assert metrics["loss"] == pytest.approx(total / tokens, abs=1e-5)
    assert metrics["tokens_trained"] == tokens
    # the comparison is worth something only if every branch was taken
    assert metrics["clip_fraction"] > 0
    assert 0 < metrics["entropy_ratio_kept"] < 1
    assert metrics["tis/capped_fraction"] > 0


def test_with_one_mini_batch_clip_and_entropy_gate_are_inert(tmp_path):
    trainer = trainer_of(tiny_policy(tmp_path / "model"), minibatches=1, learning_rate=1e-2)
    metrics = trainer.train(batch(), publication=0)
    assert metrics["clip_fraction"] == 0.0
    assert metrics["entropy_ratio_kept"] == 1.0
    assert metrics["grad_norm"] > 0


def test_with_two_mini_batches_clip_and_entropy_gate_act(tmp_path):
    trainer = trainer_of(tiny_policy(tmp_path / "model"), minibatches=2, learning_rate=1e-2)
    metrics = trainer.train(batch(), publication=0)
    assert metrics["clip_fraction"] > 0
    assert metrics["entropy_ratio_kept"] < 1


def test_training_raises_the_probability_of_rewarded_responses(tmp_path):
    model = tiny_policy(tmp_path / "model")
    groups = batch(groups=2)

    def logp(wanted):
        with torch.no_grad():
            return sum(
                d.log_prob(token).item()
                for group in groups
                for sample in group
                if sample.header.reward == wanted
                for d, token, _ in distributions(model, sample)
            )

    before = logp(1.0), logp(0.0)
    trainer = trainer_of(model, minibatches=1)
    for _ in range(3):
        trainer.train(groups, publication=0)
    assert logp(1.0) > before[0]
    assert logp(0.0) < before[1]


def test_the_size_of_micro_batches_does_not_change_the_update(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    before = parameters_of(transformers_class(True).from_pretrained(folder))
    models = [tiny_policy(folder) for _ in range(3)]
    # sgd-like gradients: recorded before AdamW, whose division by tiny second moments would amplify rounding
    gradients = []
    for model, size in zip(models, (16, 64, 4096), strict=True):
        trainer = trainer_of(model, micro_batch_tokens=size, minibatches=1)
        trainer.optimizer.register_step_pre_hook(
            lambda *_, model=model: gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        )
        trainer.train(batch(seed=2), publication=0)
    for name in before:
        assert not torch.equal(before[name], models[0].get_parameter(name)), name
        for other in (1, 2):
            torch.testing.assert_close(gradients[0][name], gradients[other][name], atol=1e-6, rtol=0, msg=name)
            difference = (models[0].get_parameter(name) - models[other].get_parameter(name)).norm()
            assert difference < 1e-3 * (models[0].get_parameter(name) - before[name]).norm(), name


def test_mini_batches_hold_every_sample_once_balanced_and_the_same_each_time(tmp_path):
    model = tiny_policy(tmp_path / "model")
    samples = [sample for group in batch(groups=6) for sample in group]
    trainer = trainer_of(model, minibatches=3, seed=7)
    split = trainer._split(samples)
    assert sorted(index for part in split for index in part) == list(range(len(samples)))
    tokens = [sum(int((samples[i].roles == 0).sum()) for i in part) for part in split]
    assert max(tokens) - min(tokens) <= 13
    assert split == trainer_of(model, minibatches=3, seed=7)._split(samples)
    trainer.step = 1
    assert split != trainer._split(samples)


def test_samples_of_the_policy_itself_have_no_mismatch_and_weight_one(tmp_path):
    model = tiny_policy(tmp_path / "model")
    groups = batch(groups=2, version=3)
    for group in groups:
        for sample in group:
            sample.roles[:] = 0
            sample.logprobs = np.array([d.log_prob(t).item() for d, t, _ in distributions(model, sample)], np.float32)
    metrics = trainer_of(model).train(groups, publication=3)
    assert metrics["mismatch_k3"] < 1e-9
    assert metrics["importance_weight_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["importance_weight_ess"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["staleness_max"] == 0


def test_mismatch_looks_only_at_the_current_publication_and_staleness_counts_publications(tmp_path):
    groups = batch(groups=2, version=3)
    trainer = trainer_of(tiny_policy(tmp_path / "model"))
    assert trainer.train(groups, publication=5)["mismatch_k3"] is None
    groups[0][0].versions[:] = 5
    expected_ages = [5 - int(v) for group in groups for s in group for v in s.versions[s.roles == 0]]
    metrics = trainer.train(groups, publication=5)
    assert metrics["mismatch_k3"] > 0
    assert metrics["staleness_max"] == 2
    assert metrics["staleness_mean"] == pytest.approx(sum(expected_ages) / len(expected_ages))


def test_tokens_of_another_sampler_are_no_mismatch_and_have_their_own_metrics(tmp_path):
    model = tiny_policy(tmp_path / "model")
    groups = batch(groups=2, version=3)
    expected = {name: [] for name in Sampler}
    for sample in (sample for group in groups for sample in group):
        sample.roles[:] = 0
        exact = np.array([d.log_prob(t).item() for d, t, _ in distributions(model, sample)], np.float32)
        sample.samplers = (np.arange(len(exact)) % 3 == 1).astype(np.uint8)
        sample.logprobs = np.where(sample.samplers == 1, exact - 0.5, exact).astype(np.float32)
        for sampler, ratio in zip(sample.samplers, np.exp(exact - sample.logprobs), strict=True):
            expected[Sampler(sampler)].append(min(float(ratio), 2.0))
    metrics = trainer_of(model).train(groups, publication=3)
    assert metrics["mismatch_k3"] < 1e-9
    assert metrics["k3/age_0"] < 1e-9
    assert metrics["k3/other_samplers"] == pytest.approx(math.exp(0.5) - 1 - 0.5, rel=1e-3)
    own, other = expected[Sampler.POLICY], expected[Sampler.SWITCHED_MODEL]
    assert metrics["sampler/switched-model/share"] == pytest.approx(len(other) / len(own + other))
    assert metrics["sampler/switched-model/mass"] == pytest.approx(sum(other) / sum(own + other), rel=1e-4)
    assert metrics["sampler/policy/mass"] + metrics["sampler/switched-model/mass"] == pytest.approx(1)
    assert metrics["sampler/policy/ess"] == pytest.approx(1, abs=1e-5)
    assert "sampler/compressed-kv/share" not in metrics


def test_metrics_describe_the_batch(tmp_path):
    groups = batch(groups=3)
    for sample in groups[2]:
        sample.header = msgspec.structs.replace(sample.header, reward=1.0)
    samples = [sample for group in groups for sample in group]
    rewards = [sample.header.reward for sample in samples]
    metrics = trainer_of(tiny_policy(tmp_path / "model")).train(groups, publication=0)
    assert metrics["reward_mean"] == pytest.approx(np.mean(rewards))
    assert metrics["reward_std"] == pytest.approx(np.std(rewards))
    assert metrics["groups_without_signal"] == 1
    assert metrics["response_length_mean"] == pytest.approx(np.mean([len(sample.token_ids) for sample in samples]))
    assert metrics["truncated_fraction"] == pytest.approx(0.25)
    assert metrics["tokens_trained"] == sum(int((sample.roles == 0).sum()) for sample in samples)
    assert metrics["skipped_steps"] == 0
    assert 0 < metrics["entropy"] < math.log(64)


def test_an_empty_batch_trains_nothing_and_counts_as_a_step(tmp_path):
    model = tiny_policy(tmp_path / "model")
    before, trainer = parameters_of(model), trainer_of(model)
    metrics = trainer.train([], publication=0)
    assert metrics["loss"] == 0.0
    assert metrics["tokens_trained"] == 0
    assert all(value is None or math.isfinite(value) for value in metrics.values())
    assert all(torch.equal(before[name], value) for name, value in parameters_of(model).items())
    assert trainer.step == 1


def test_a_batch_without_signal_has_loss_zero_and_no_gradient(tmp_path):
    rng = np.random.default_rng(0)
    groups = [[trajectory(rng, lease=g, sample=s, reward=float(g)) for s in range(3)] for g in range(2)]
    groups.append([trajectory(rng, lease=2, reward=5.0, response=0)])
    model = tiny_policy(tmp_path / "model")
    before = parameters_of(model)
    metrics = trainer_of(model).train(groups, publication=0)
    assert metrics["loss"] == 0.0
    assert metrics["grad_norm"] == 0.0
    assert metrics["groups_without_signal"] == 3
    assert all(torch.equal(before[name], value) for name, value in parameters_of(model).items())


def test_weight_decay_touches_matrices_only(tmp_path):
    rng = np.random.default_rng(0)
    model = tiny_policy(tmp_path / "model")
    before = parameters_of(model)
    trainer = trainer_of(model, minibatches=1, weight_decay=0.5, learning_rate=0.1)
    trainer.train([[trajectory(rng) for _ in range(2)]], publication=0)
    for name, value in parameters_of(model).items():
        factor = 1 - 0.1 * 0.5 if before[name].ndim >= 2 else 1.0
        torch.testing.assert_close(value, before[name] * factor, msg=name)


def test_a_gradient_that_is_not_finite_skips_the_optimiser_step_and_is_counted(tmp_path):
    model = tiny_policy(tmp_path / "model")
    before, trainer = parameters_of(model), trainer_of(model, minibatches=2)
    handle = model.get_parameter("model.norm.weight").register_hook(lambda gradient: gradient * math.nan)
    metrics = trainer.train(batch(), publication=0)
    assert metrics["skipped_steps"] == 2
    assert metrics["grad_norm"] is None
    assert all(torch.equal(before[name], value) for name, value in parameters_of(model).items())
    handle.remove()
    assert trainer.train(batch(), publication=0)["skipped_steps"] == 0


def test_gradients_above_the_limit_are_skipped_and_too_many_end_the_run(tmp_path):
    model = tiny_policy(tmp_path / "model")
    before, trainer = parameters_of(model), trainer_of(model, max_update_norm=1e-9, max_skipped_steps=3)
    assert trainer.train(batch(), publication=0)["skipped_steps"] == 2
    assert all(torch.equal(before[name], value) for name, value in parameters_of(model).items())
    with pytest.raises(RunFailed, match="3 optimiser steps in a row were skipped"):
        trainer.train(batch(), publication=0)
    trainer = trainer_of(model, max_update_norm=1e9, max_skipped_steps=1)
    assert trainer.train(batch(), publication=0)["skipped_steps"] == 0


def test_the_gradient_norm_is_clipped(tmp_path):
    model = tiny_policy(tmp_path / "model")
    trainer = trainer_of(model, minibatches=1, max_grad_norm=1e-3)
    norms = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
    )
    metrics = trainer.train(batch(), publication=0)
    assert norms == [pytest.approx(1e-3, rel=1e-3)]
    assert metrics["grad_norm"] > 1e-2


def test_the_learning_rate_warms_up_linearly_over_batches(tmp_path):
    trainer = trainer_of(tiny_policy(tmp_path / "model"), warmup_steps=4, learning_rate=8e-4)
    rates = [trainer.train([], publication=0)["learning_rate"] for _ in range(6)]
    assert rates == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 8e-4, 8e-4])


def test_an_entropy_bonus_raises_entropy(tmp_path):
    rng = np.random.default_rng(0)
    groups = [[trajectory(rng, sample=s, response=12) for s in range(4)]]
    objective = ObjectiveSection(regularisers=[{"name": "entropy-bonus", "coefficient": 0.1}])
    trainer = trainer_of(tiny_policy(tmp_path / "model"), objective=objective)
    entropies = [trainer.train(groups, publication=0)["entropy"] for _ in range(4)]
    assert entropies == sorted(entropies)
    assert entropies[-1] > entropies[0]


def test_greedy_rollouts_are_refused(tmp_path):
    model = tiny_policy(tmp_path / "model")
    with pytest.raises(UsageError, match="temperature 0"):
        Trainer(model, Objective.from_config(ObjectiveSection()), LearnerSection(), temperature=0)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ("cosine", [0.5, 1, 1, 0.2 + 0.4 * (1 + 2**-0.5), 0.6, 0.2 + 0.4 * (1 - 2**-0.5), 0.2, 0.2]),
    ],
)
def test_the_learning_rate_follows_its_schedule_to_the_end_of_the_run(schedule, rates):
    section = LearnerSection(
        learning_rate=2e-3, warmup_steps=2, learning_rate_schedule=schedule, final_learning_rate=0.2
    )
    assert [learning_rate(step, 6, section) for step in range(8)] == pytest.approx([2e-3 * rate for rate in rates])


def test_the_trainer_takes_the_schedules_rate(tmp_path):
    section = LearnerSection(learning_rate=1e-3, learning_rate_schedule="linear")
    objective = Objective.from_config(ObjectiveSection())
    trainer = Trainer(tiny_policy(tmp_path / "model"), objective, section, temperature=1.0, steps=4)
    assert [trainer.train([], publication=0)["learning_rate"] for _ in range(4)] == pytest.approx(
        [1e-3, 7.5e-4, 5e-4, 2.5e-4]
    )
