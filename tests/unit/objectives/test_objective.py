"""Pieces and their composition against the vectors of the papers and against loops over single tokens."""

import math

import pytest
import torch

from learner.objective import Objective
from learner.pieces import BUILT_IN, build
from learner.ratios import effective_sample_fraction, finite_or_zero, importance_ratio, k3
from learner.tokens import BatchTokens, GroupRewards, MicroBatchTokens
from pipeline.config.types import ObjectiveSection

RATIOS = torch.tensor([1.0, 0.4, 6.0, 0.9])


def group_rewards(rewards, groups):
    count = len(rewards)
    return GroupRewards(
        rewards=torch.tensor(rewards),
        groups=torch.tensor(groups),
        lengths=torch.ones(count, dtype=torch.int64),
        truncated=torch.zeros(count, dtype=torch.bool),
    )


def batch_tokens(ratio):
    zeros = torch.zeros(len(ratio))
    return BatchTokens(
        logp_old=ratio.log(),
        logp_behaviour=zeros,
        sequence=torch.arange(len(ratio)),
        advantage=zeros,
        age=zeros.long(),
        sampler=zeros.long(),
    )


def micro_batch(ratio, advantage, *, entropy=None, entropy_old=None, weight=None, denominator=1.0):
    """Tokens with the given pi / pi_old; log pi is a leaf, so that gradients with respect to it can be read."""
    ratio = torch.as_tensor(ratio, dtype=torch.float32)
    ones = torch.ones_like(ratio)
    logp = (ratio.log() - 1.0).requires_grad_()
    return MicroBatchTokens(
        logp=logp,
        entropy=ones if entropy is None else torch.tensor(entropy),
        logp_old=-ones,
        entropy_old=ones if entropy_old is None else torch.tensor(entropy_old),
        logp_behaviour=-ones,
        advantage=torch.as_tensor(advantage, dtype=torch.float32),
        weight=ones if weight is None else torch.tensor(weight),
        sequence=torch.zeros(len(ratio), dtype=torch.int64),
        coefficient=ones / denominator,
    )


def test_grpo_advantages_equal_the_published_vector():
    advantages = build("advantage", {"name": "grpo"})(group_rewards([1.0, 0.0, 0.0, 1.0], [0, 0, 0, 0]))
    assert advantages.tolist() == pytest.approx([0.866024, -0.866024, -0.866024, 0.866024], abs=1e-6)


def test_grpo_without_deviation_subtracts_only_the_mean():
    grpo = build("advantage", {"name": "grpo", "normalise_std": False})
    advantages = grpo(group_rewards([1.0, 0.0, 5.0, 2.0, 2.0], [0, 0, 1, 1, 1]))
    assert advantages.tolist() == pytest.approx([0.5, -0.5, 2.0, -1.0, -1.0])


def test_grpo_groups_do_not_touch_each_other_and_need_not_be_contiguous():
    grpo = build("advantage", {"name": "grpo"})
    mixed = grpo(group_rewards([1.0, 7.0, 0.0, 3.0], [0, 1, 0, 1]))
    assert mixed[[0, 2]].tolist() == pytest.approx(grpo(group_rewards([1.0, 0.0], [0, 0])).tolist())
    assert mixed[[1, 3]].tolist() == pytest.approx(grpo(group_rewards([7.0, 3.0], [0, 0])).tolist())


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_grpo_gives_exactly_zero_to_a_group_of_one_and_to_equal_rewards(epsilon):
    advantages = build("advantage", {"name": "grpo", "epsilon": epsilon})(
        group_rewards([0.3, 0.1, 0.1, 0.1], [0, 1, 1, 1])
    )
    assert advantages.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_importance_measures_equal_the_published_vectors():
    log_ratio, zeros = RATIOS.log(), torch.zeros(4)
    assert k3(log_ratio, zeros).tolist() == pytest.approx([0, 0.316291, 3.208241, 0.005361], abs=1e-6)
    assert float(k3(log_ratio, zeros).mean()) == pytest.approx(0.882473, abs=1e-6)
    assert effective_sample_fraction(RATIOS) == pytest.approx(0.453582, abs=1e-6)
    assert effective_sample_fraction(torch.zeros(3)) == 0.0


def test_ratios_are_finite_for_any_log_probs_and_unusable_weights_are_zero():
    logp = torch.tensor([0.0, -1e30, math.nan, -math.inf])
    ratio = finite_or_zero(importance_ratio(logp, torch.tensor([-1e30, 0.0, 0.0, -math.inf])))
    assert ratio.tolist() == pytest.approx([math.exp(20), math.exp(-20), 0.0, 0.0])


def test_tis_caps_the_published_vector_and_is_detached():
    tokens = batch_tokens(RATIOS.clone().requires_grad_())
    weight, metrics = build("correction", {"name": "tis"})(torch.ones(4), tokens)
    assert weight.tolist() == pytest.approx([1, 0.4, 2, 0.9])
    assert not weight.requires_grad
    assert metrics["capped_fraction"] == 0.25
    assert metrics["ratio_max"] == pytest.approx(6.0)


@pytest.mark.parametrize("name", sorted(BUILT_IN["correction"]))
def test_corrections_are_one_where_the_policy_itself_sampled(name):
    weight, _ = build("correction", {"name": name})(torch.ones(5), batch_tokens(torch.ones(5)))
    assert weight.tolist() == [1.0] * 5


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [
        (1.0, 1.5, -1.5),  # inside the band: -A r
        (0.5, -1.0, 0.0),  # low and getting worse: clipped
        (0.5, 1.0, -0.5),  # low and getting better: not
        (2.0, 1.0, 0.0),
        (1.27, 1.0, -1.27),  # between 1.2 and 1.28: clip-higher
        (2.0, -1.0, 2.0),
        (11.0, -1.0, 0.0),  # dual clip
    ],
)
def test_ppo_clip_has_the_gradient_of_its_equation(ratio, advantage, gradient):
    tokens = micro_batch([ratio], [advantage])
    loss, metrics = build("surrogate", {"name": "ppo-clip"})(tokens)
    (measured,) = torch.autograd.grad(loss.sum(), tokens.logp)
    assert float(measured) == pytest.approx(gradient, abs=1e-5)
    assert bool(metrics["clip_fraction"]) == (gradient == 0.0)


def test_without_dual_clip_a_large_ratio_costs_in_full():
    loss, _ = build("surrogate", {"name": "ppo-clip", "dual_clip": 0})(micro_batch([50.0], [-1.0]))
    assert float(loss.detach()) == pytest.approx(50.0, rel=1e-5)


def test_erc_takes_the_gradient_of_tokens_outside_the_band_and_keeps_their_value():
    tokens = micro_batch([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], entropy=[0.53, 0.52, 0.47], entropy_old=[0.5, 0.5, 0.5])
    before = -tokens.advantage * importance_ratio(tokens.logp, tokens.logp_old)
    after, metrics = build("gate", {"name": "erc"})(before, tokens)
    assert after.tolist() == before.tolist()
    (gradient,) = torch.autograd.grad(after.sum(), tokens.logp)
    assert gradient.tolist() == pytest.approx([0.0, -1.0, 0.0])
    assert metrics["entropy_ratio_kept"].tolist() == [False, True, False]
    assert metrics["above"].tolist() == [True, False, False]
    assert metrics["below"].tolist() == [False, False, True]


def test_erc_is_identity_where_entropies_are_equal_even_at_zero():
    tokens = micro_batch([1.0, 2.0], [1.0, -1.0], entropy=[0.0, 0.7], entropy_old=[0.0, 0.7])
    loss, _ = build("surrogate", {"name": "ppo-clip"})(tokens)
    gated, _ = build("gate", {"name": "erc"})(loss, tokens)
    assert torch.equal(torch.autograd.grad(loss.sum(), tokens.logp, retain_graph=True)[0],
                       torch.autograd.grad(gated.sum(), tokens.logp)[0])  # fmt: skip


def one_token(ratio, advantage, weight, entropy, entropy_old, coefficient):
    """Value of a token's loss and its derivative with respect to log pi, from the equations, case by case."""
    inside = 0.8 <= ratio <= 1.28
    if advantage >= 0:
        value, slope = -advantage * min(ratio, 1.28), 0.0 if ratio > 1.28 else -advantage * ratio
    elif ratio > 10:
        value, slope = -advantage * 10, 0.0
    else:
        value, slope = -advantage * max(ratio, 0.8), -advantage * ratio if inside or ratio > 1.28 else 0.0
    value, slope = value * weight, slope * weight
    quotient = (entropy + 1e-8) / (entropy_old + 1e-8)
    if not 0.95 < quotient < 1.05:
        slope = 0.0
    return value - coefficient * entropy, slope


def test_the_composed_objective_equals_loops_over_tokens():
    generator = torch.Generator().manual_seed(3)
    count, coefficient, denominator = 400, 0.02, 1000.0
    ratio = torch.exp(torch.randn(count, generator=generator) * 1.2)
    ratio[:3] = torch.tensor([15.0, 12.0, 0.01])
    advantage = torch.randn(count, generator=generator)
    advantage[:2] = -1.0
    weight = torch.rand(count, generator=generator) * 2
    entropy_old = torch.rand(count, generator=generator)
    entropy = entropy_old * (1 + 0.05 * torch.randn(count, generator=generator))
    section = ObjectiveSection(regularisers=[{"name": "entropy-bonus", "coefficient": coefficient}])
    tokens = micro_batch(
        ratio, advantage, entropy=entropy.tolist(), entropy_old=entropy_old.tolist(), weight=weight.tolist(),
        denominator=denominator,
    )  # fmt: skip

    loss, sums = Objective.from_config(section).loss(tokens)
    (gradient,) = torch.autograd.grad(loss, tokens.logp)

    columns = zip(
        *(column.double().tolist() for column in (ratio, advantage, weight, entropy, entropy_old)), strict=True
    )
    expected = [one_token(*row, coefficient) for row in columns]
    assert loss.item() == pytest.approx(sum(value for value, _ in expected) / denominator, rel=1e-5)
    assert gradient.tolist() == pytest.approx([slope / denominator for _, slope in expected], abs=1e-7)
    kept = sum(0.95 < q < 1.05 for q in ((entropy + 1e-8) / (entropy_old + 1e-8)).tolist())
    assert float(sums["entropy_ratio_kept"]) == kept
    assert 0 < kept < count
    assert 0 < float(sums["clip_fraction"]) < count
    assert float(sums["ppo-clip/dual"]) == int(((ratio > 10) & (advantage < 0)).sum()) >= 2


def test_shares_of_micro_batches_add_up_to_the_loss_of_the_mini_batch():
    objective = Objective.from_config(ObjectiveSection())
    ratio, advantage = torch.linspace(0.5, 1.5, 12), torch.linspace(-1, 1, 12)
    whole, _ = objective.loss(micro_batch(ratio, advantage, denominator=12))
    parts = [
        objective.loss(micro_batch(ratio[cut], advantage[cut], denominator=12))[0]
        for cut in (slice(0, 1), slice(1, 8), slice(8, 12))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-7)


def test_the_entropy_bonus_moves_entropy_up():
    tokens = micro_batch([1.0], [0.0])
    entropy = torch.tensor([0.3], requires_grad=True)
    bonus = build("regulariser", {"name": "entropy-bonus", "coefficient": 0.5})
    term, _ = bonus(MicroBatchTokens(**{**{f: getattr(tokens, f) for f in tokens.__slots__}, "entropy": entropy}))
    (gradient,) = torch.autograd.grad(term.sum(), entropy)
    assert float(gradient) == -0.5


def test_what_pieces_remember_is_kept_and_put_back():
    table = {"name": "entropic", "target": 0.3}
    section = ObjectiveSection(modulators=[table], regularisers=[{"name": "siren"}, {"name": "adaptive-entropy"}])
    first, second = Objective.from_config(section), Objective.from_config(section)
    first.modulators[0].restore({"integral": 0.25})
    first.regularisers[0].restore({"anchor": 1.5})
    first.regularisers[1].restore({"coefficient": 0.04})
    second.restore(first.state())
    assert second.state() == first.state()
    assert sorted(value for state in second.state().values() for value in state.values()) == [0.04, 0.25, 1.5]
    second.restore({})
    assert second.state() == Objective.from_config(section).state()
