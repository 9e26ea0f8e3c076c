"""Surrogates: their gradients as the papers state them, and their values in loops over single tokens."""

import math
import statistics

import pytest
import torch

from learner.pieces import BUILT_IN, build
from learner.surrogates.dppo import binary_kl
from learner.surrogates.m2po import second_moment_threshold
from pipeline.errors import UsageError
from tests.unit.objectives.scenes import gradient_of, tokens_of, with_plan

CE = {"name": "ce-gppo", "clip_low": 0.2, "clip_high": 0.28, "beta_low": 0.75}


def random_ratios(count=80, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ratios = torch.exp(torch.randn(count, generator=draw, dtype=torch.float64))
    ratios[:2] = torch.tensor([15.0, 0.01])
    return ratios.tolist(), torch.randn(count, generator=draw, dtype=torch.float64).tolist()


@pytest.mark.parametrize(
    ("table", "ratio", "advantage", "gradient"),
    [
        ({"name": "ppo-clip"}, 0.5, -1, 0.0),
        ({"name": "gppo"}, 0.5, -1, 0.8),
        (CE, 0.5, -1, 0.6),
        ({"name": "gppo"}, 2.0, 1, -1.28),
        ({"name": "gppo"}, 2.0, -1, 2.0),
        (CE, 2.0, -1, 2.0),
        ({"name": "ppo-clip"}, 2.0, -1, 2.0),
        ({"name": "gppo"}, 0.5, 1, -0.5),  # the pessimistic quadrants keep F = r ...
        ({"name": "cispo", "floor": 0.8, "cap": 1.28}, 0.5, 1, -0.8),  # ... and CISPO clips all four
        ({"name": "gppo"}, 11.0, -1, 0.0),  # dual clip
        ({"name": "cispo"}, 7.0, 1, -5.0),
        ({"name": "cispo"}, 0.01, -1, 0.01),
    ],
)
def test_published_gradients(table, ratio, advantage, gradient):
    (measured,) = gradient_of(table, tokens_of([ratio], [advantage]))
    assert measured == pytest.approx(gradient, abs=1e-9)


def test_without_betas_ce_gppo_has_the_gradient_of_ppos_clip_and_with_both_that_of_gppo():
    ratios, advantages = random_ratios()
    tokens = tokens_of(ratios, advantages)
    both = {**CE, "beta_low": 1.0, "beta_high": 1.0}
    assert gradient_of(both, tokens) == pytest.approx(gradient_of({"name": "gppo"}, tokens))
    neither = {**CE, "beta_low": 0.0, "beta_high": 0.0}
    assert gradient_of(neither, tokens) == pytest.approx(gradient_of({"name": "ppo-clip"}, tokens))


def test_gppo_has_the_value_of_ppos_clip():
    ratios, advantages = random_ratios()
    tokens = tokens_of(ratios, advantages)
    loss, metrics = build("surrogate", {"name": "gppo"})(tokens)
    ppo, _ = build("surrogate", {"name": "ppo-clip"})(tokens)
    torch.testing.assert_close(loss, ppo)
    assert metrics["low"].any() and metrics["high"].any() and metrics["dual"].any()


def loop(name, ratio, advantage, p_old):
    """Value of the loss and derivative with respect to log pi of one token, from the equations."""
    logp = math.log(ratio) + math.log(p_old)
    if name == "gppo":
        factor = ratio
        if ratio < 0.8 and advantage < 0:
            factor = 0.8
        elif ratio > 1.28 and advantage > 0:
            factor = 1.28
        elif ratio > 10 and advantage < 0:
            return -advantage * 10, 0.0
        return -advantage * factor, -advantage * factor
    if name == "cispo":
        weight = min(ratio, 5.0)
        return -weight * advantage * logp, -weight * advantage
    if name == "sapo":
        tau = 1.0 if advantage > 0 else 1.05
        gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
        return -advantage * gate * 4 / tau, -advantage * 4 * gate * (1 - gate) * ratio
    if name == "dppo":
        moved = ratio * p_old - p_old
        if (advantage > 0 and moved > 0.15) or (advantage <= 0 and moved < -0.15):
            return 0.0, 0.0
        weight = min(ratio, 20.0)
        return -advantage * weight * logp, -advantage * weight
    if name == "reinforce":
        return -advantage * logp, -advantage
    assert name == "unclipped"
    return -advantage * ratio, -advantage * ratio


@pytest.mark.parametrize("name", ["gppo", "cispo", "sapo", "dppo", "reinforce", "unclipped"])
def test_token_surrogates_equal_a_loop(name):
    ratios, advantages = random_ratios()
    p_old = [0.02 + 0.9 * i / 80 for i in range(80)]
    ratios = [min(r, 0.99 / p) for r, p in zip(ratios, p_old, strict=True)]
    logp_old = [math.log(p) for p in p_old]
    tokens = tokens_of(ratios, advantages, logp_old=torch.tensor(logp_old, dtype=torch.float64),
                       logp=[math.log(r) + o for r, o in zip(ratios, logp_old, strict=True)])  # fmt: skip
    loss, _ = build("surrogate", {"name": name})(tokens)
    expected = [loop(name, *values) for values in zip(ratios, advantages, p_old, strict=True)]
    assert loss.tolist() == pytest.approx([value for value, _ in expected], rel=1e-6)
    assert gradient_of({"name": name}, tokens) == pytest.approx([slope for _, slope in expected], rel=1e-6, abs=1e-12)


def test_sapo_has_the_published_values():
    for tau, advantage, value in ((1.0, 1.0, 2.489837), (1.05, -1.0, 2.393585)):
        loss, _ = build("surrogate", {"name": "sapo"})(tokens_of([1.0, 1.5], [advantage] * 2))
        assert (loss / -advantage).tolist() == pytest.approx([2 / tau, value], abs=1e-6)
        assert gradient_of({"name": "sapo"}, tokens_of([1.0], [advantage])) == pytest.approx([-advantage])


def test_dppo_masks_the_published_cases():
    def kept(table, p, advantage):
        tokens = tokens_of([p / 0.5], [advantage], logp=[math.log(p)])
        return gradient_of({"name": "dppo", **table}, tokens)[0] != 0

    assert binary_kl(torch.tensor([0.5]), torch.tensor([0.6])).item() == pytest.approx(0.020411, abs=1e-6)
    assert binary_kl(torch.tensor([0.5]), torch.tensor([0.7])).item() == pytest.approx(0.087177, abs=1e-6)
    kl = {"divergence": "kl", "low": 0.05, "high": 0.05}
    assert kept(kl, 0.6, 1.0) and not kept(kl, 0.7, 1.0) and kept(kl, 0.7, -1.0)
    assert kept({}, 0.6, 1.0) and not kept({}, 0.7, 1.0) and kept({}, 0.7, -1.0)


def test_gmpo_has_the_published_value_and_the_gradient_of_the_geometric_mean():
    tokens = tokens_of([1.1, 2.0, 0.5], [1.0] * 3)
    loss, metrics = build("surrogate", {"name": "gmpo"})(tokens)
    assert loss.tolist() == pytest.approx([-0.936182] * 3, abs=1e-6)
    assert metrics["clip_fraction"].tolist() == [False, True, False]
    # the mean over the sample of L_t has d L / d log pi_t = -A exp(mean u) / 3 where u_t is not clipped
    gradient = [value / 3 for value in gradient_of({"name": "gmpo"}, tokens)]
    assert gradient == pytest.approx([-0.936182 / 3, 0.0, -0.936182 / 3], abs=1e-6)


def test_gmpo_clips_the_other_side_where_the_advantage_is_negative():
    loss, metrics = build("surrogate", {"name": "gmpo"})(tokens_of([1.1, 2.0, 0.5], [-2.0] * 3))
    u = [math.log(1.1), math.log(2.0), -0.4]
    assert loss.tolist() == pytest.approx([2 * math.exp(statistics.mean(u))] * 3)
    assert metrics["clip_fraction"].tolist() == [False, False, True]


def test_gspo_equals_a_loop_over_samples():
    ratios, _ = random_ratios(60)
    ratios = [r**0.002 for r in ratios]
    sequence = [i // 6 for i in range(60)]
    advantages = [(1.0, -0.7, 2.0, -1.0)[s % 4] for s in sequence]
    tokens = tokens_of(ratios, advantages, sequence=sequence)
    loss, metrics = build("surrogate", {"name": "gspo"})(tokens)
    values, slopes = [], []
    for s in range(10):
        own = [math.log(r) for r, q in zip(ratios, sequence, strict=True) if q == s]
        a, ratio = advantages[s * 6], math.exp(statistics.mean(own))
        value = max(-a * ratio, -a * min(max(ratio, 1 - 3e-4), 1 + 4e-4))
        clipped = (ratio < 1 - 3e-4 and a < 0) or (ratio > 1 + 4e-4 and a > 0)
        values += [value] * 6
        slopes += [0.0 if clipped else -a * ratio] * 6
    assert loss.tolist() == pytest.approx(values)
    assert gradient_of({"name": "gspo"}, tokens) == pytest.approx(slopes)
    assert 0 < metrics["clip_fraction"].float().mean() < 1


def test_topr_tapers_negative_samples_only():
    tokens = tokens_of([1.0] * 6, [1, 1, -1, -1, -1, -1], sequence=[0, 0, 1, 1, 2, 2],
                       logp=[-1.0] * 6, logp_behaviour=torch.tensor([-2.0, -2, -0.5, -0.4, -2, -2]))  # fmt: skip
    expected = [-1, -1, math.exp(-1.1), math.exp(-1.1), 1, 1]
    assert gradient_of({"name": "topr"}, tokens) == pytest.approx(expected)


def test_m2po_keeps_the_published_candidates():
    squares = torch.tensor([0.2, 0.01, 0.04, 0.02])
    threshold = second_moment_threshold(squares, 0.04)
    assert (squares <= threshold).tolist() == [False, True, True, True]
    assert second_moment_threshold(squares, 1.0) == pytest.approx(0.2)
    assert second_moment_threshold(squares, 0.001) < 0
    assert second_moment_threshold(torch.empty(0), 0.04) < 0


def test_m2po_drops_only_tokens_that_moved_with_the_update():
    log = [math.sqrt(v) for v in (0.01, 0.02, 0.04, 0.2)]
    ratios = [math.exp(v) for v in log] + [math.exp(-log[3]), math.exp(log[3])]
    tokens = tokens_of(ratios, [1, 1, 1, 1, 1, -1])
    piece = build("surrogate", {"name": "m2po"})
    loss, metrics = piece(with_plan(piece, tokens))
    assert metrics["clip_fraction"].tolist() == [False, False, False, True, False, False]
    expected = [-r * a for r, a in zip(ratios, [1, 1, 1, 0, 1, -1], strict=True)]
    assert loss.tolist() == pytest.approx(expected)


def test_hapo_equals_a_loop():
    ratios, advantages = random_ratios(60)
    draw = torch.Generator().manual_seed(9)
    entropy = torch.rand(60, generator=draw, dtype=torch.float64) * 2 + 0.01
    piece = build("surrogate", {"name": "hapo"})
    tokens = with_plan(piece, tokens_of(ratios, advantages, entropy=entropy))
    log = [math.log(h) for h in entropy.tolist()]
    ordered = sorted(log)
    middle = ordered[47] + (ordered[48] - ordered[47]) * 0.2  # 0.8 * 59 = 47.2
    largest, smallest = max(log) - middle, middle - min(log)
    h = [(v - middle) / (largest if v > middle else smallest) for v in log]
    assert tokens.planned.tolist() == pytest.approx(h, abs=1e-6)
    assert min(h) == pytest.approx(-1) and max(h) == pytest.approx(1)
    expected = []
    for ratio, advantage, standing in zip(ratios, advantages, h, strict=True):
        inside = 0.9 < ratio < 1.1
        a = advantage * (1 + standing) if inside == (standing <= 0) else advantage
        low = 1 - 0.2 * (1 - standing) if standing <= 0 else 0.8
        high = 1 + 0.2 * (1 + standing) if standing > 0 else 1.2
        value = max(-a * ratio, -a * min(max(ratio, low), high))
        expected.append(min(value, -a * 10) if a < 0 else value)
    assert piece(tokens)[0].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)


ONE_AT_ONE = ["ppo-clip", "gppo", "ce-gppo", "cispo", "dppo", "reinforce", "unclipped", "sapo", "gspo", "gmpo", "m2po"]


@pytest.mark.parametrize("name", ONE_AT_ONE)
def test_at_ratio_one_all_have_the_policy_gradient(name):
    tokens = tokens_of([1.0] * 5, [1.0, -0.5, 2.0, 0.1, -3.0], sequence=[0, 1, 2, 3, 4])
    assert gradient_of({"name": name}, tokens) == pytest.approx([-1.0, 0.5, -2.0, -0.1, 3.0])


@pytest.mark.parametrize("name", sorted(BUILT_IN["surrogate"]))
def test_extreme_log_probs_give_finite_losses_and_gradients(name):
    logp = [-1e-9, -80.0, -1.0, -2.0]
    tokens = tokens_of([1.0] * 4, [1.0, -1.0, 1.0, -1.0], logp=logp, sequence=[0, 1, 2, 3],
                       logp_old=torch.tensor([-90.0, -1e-9, -1.0, -2.0]).double())  # fmt: skip
    piece = build("surrogate", {"name": name})
    tokens = with_plan(piece, tokens)
    loss, _ = piece(tokens)
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), tokens.logp)[0].isfinite().all()


@pytest.mark.parametrize("name", ["ppo-clip", "gppo", "ce-gppo", "gspo", "hapo"])
def test_a_dual_clip_inside_the_band_is_refused(name):
    with pytest.raises(UsageError, match="dual_clip"):
        build("surrogate", {"name": name, "dual_clip": 1.0})


def test_cispo_bounds_without_one_are_refused():
    with pytest.raises(UsageError, match="must hold 1"):
        build("surrogate", {"name": "cispo", "cap": 0.9})
