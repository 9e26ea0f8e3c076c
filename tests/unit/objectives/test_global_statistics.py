"""Statistics declared global: the same for any micro-batch size and any order of samples (ranks: test_ranks.py)."""

import pytest
import torch

from learner.segments import positions, quantile, sequence_quantile, token_uniforms
from learner.testing import random_batch, random_tokens, select
from learner.trainer import Trainer
from pipeline.config.recipes import recipe_names
from tests.unit.learner_samples import tiny_folder, tiny_policy
from tests.unit.objectives.scenes import WITH_PLAN, built
from tests.unit.test_recipes import ACTS, objective_of, samples_of


def loss_and_gradient(whole, logits, tokens, parts, plans=None):
    plans = whole.plans(tokens) if plans is None else plans
    total = sum(whole.loss(select(tokens, part), {key: plan[part] for key, plan in plans.items()})[0] for part in parts)
    return total.detach().item(), torch.autograd.grad(total, logits, retain_graph=True)[0]


def in_samples(sequence, order):
    return torch.cat([(sequence == sample).nonzero()[:, 0] for sample in order])


@pytest.mark.parametrize("name", WITH_PLAN)
def test_plans_do_not_depend_on_order_or_division(name):
    batch = random_batch(1, samples=16)
    logits, tokens = random_tokens(batch, 1)
    whole = built(name)
    everything = torch.arange(len(batch.sequence))
    loss, gradient = loss_and_gradient(whole, logits, tokens, [everything])
    draw = torch.Generator().manual_seed(0)
    for pieces in (1, 3, 16):
        order = torch.randperm(16, generator=draw).chunk(pieces)
        parts = [in_samples(batch.sequence, chunk.tolist()) for chunk in order]
        again = loss_and_gradient(whole, logits, tokens, parts)
        assert again[0] == pytest.approx(loss, rel=1e-9)
        torch.testing.assert_close(again[1], gradient)
        # and with the plan itself made in that order
        index = torch.cat(parts)
        moved = whole.plans(select(tokens, index))
        for key, plan in whole.plans(tokens).items():
            torch.testing.assert_close(moved[key], plan[index])


@pytest.mark.parametrize("name", sorted(set(WITH_PLAN) - {"positive-nll"}))
def test_a_plan_made_of_each_micro_batch_alone_would_be_seen(name):
    batch = random_batch(1, samples=48)
    logits, tokens = random_tokens(batch, 1)
    whole = built(name)
    parts = [in_samples(batch.sequence, range(24)), in_samples(batch.sequence, range(24, 48))]
    _, right = loss_and_gradient(whole, logits, tokens, parts)
    wrong = torch.zeros_like(right)
    for part in parts:
        own = select(tokens, part)
        wrong += loss_and_gradient(whole, logits, own, [torch.arange(len(part))], whole.plans(own))[1]
    assert not torch.allclose(right, wrong, rtol=1e-3, atol=1e-9)


@pytest.mark.slow
def test_no_recipes_gradient_depends_on_the_size_of_micro_batches(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    for name in recipe_names():
        gradients = []
        for size in (24, 1024):
            objective_, config = objective_of(
                name, f"learner.micro_batch_tokens={size}", "sampling.max_new_tokens=16", *ACTS.get(name, [])
            )
            config.learner.minibatches, config.learner.max_grad_norm = 1, 1e9
            policy = tiny_policy(folder)
            reference = tiny_policy(folder)
            trainer = Trainer(policy, objective_, config.learner, 1.0, reference=reference, max_response_tokens=16)
            seen = []
            trainer.optimizer.register_step_pre_hook(
                lambda *_, p=policy, s=seen: s.append(torch.cat([q.grad.flatten() for q in p.parameters()]))
            )
            trainer.train(samples_of(tiny_policy(folder), 0, name == "aepo"), publication=2)
            gradients += seen
        one, other = gradients
        assert float(one.norm()) > 0 and float((one - other).norm()) < 2e-4 * float(one.norm()), name


def test_a_tokens_random_number_belongs_to_the_token():
    sequence = torch.tensor([0, 0, 0, 5, 5, 9])
    uniforms = token_uniforms(3, 7, sequence, positions(sequence))
    order = torch.tensor([3, 4, 5, 0, 1, 2])
    assert torch.equal(token_uniforms(3, 7, sequence[order], positions(sequence[order])), uniforms[order])
    for seed, step in ((4, 7), (3, 8), (-1, 7), (2**63, 7)):
        assert not torch.equal(token_uniforms(seed, step, sequence, positions(sequence)), uniforms)


def test_random_numbers_of_tokens_are_uniform():
    sequence = torch.arange(200).repeat_interleave(100)
    uniforms = token_uniforms(0, 0, sequence, positions(sequence))
    assert uniforms.min() >= 0 and uniforms.max() < 1
    counts = torch.histc(uniforms, 20, 0, 1)
    chi_square = float(((counts - 1000).square() / 1000).sum())
    assert chi_square < 43.8  # 0.999 quantile with 19 degrees of freedom
    assert len(uniforms.unique()) == 20_000
    successive = torch.corrcoef(torch.stack([uniforms[:-1], uniforms[1:]]))[0, 1]
    assert abs(float(successive)) < 0.03


def test_quantiles_equal_torchs():
    values = torch.randn(101, generator=torch.Generator().manual_seed(0))
    for q in (0.0, 0.17, 0.5, 0.8, 1.0):
        torch.testing.assert_close(quantile(values, q), values.quantile(q))
    sequence = torch.arange(101) // 7
    found = sequence_quantile(values, sequence, 0.8)
    for s in sequence.unique():
        torch.testing.assert_close(found[sequence == s][0], values[sequence == s].quantile(0.8))
