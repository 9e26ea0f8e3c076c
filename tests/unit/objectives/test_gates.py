"""Gates and entropy control against the papers' numbers and loops over single tokens."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from learner.gates.clip_b import discriminator
from learner.gates.covariance import covariance
from learner.gates.spine import median, otsu_threshold
from learner.gates.steer import entropy_effect
from learner.pieces import BUILT_IN, build
from learner.segments import token_uniforms
from learner.testing import select
from tests.unit.objectives.scenes import random_batch, random_tokens, tokens_of, with_plan


def gated(table, tokens):
    """What is left of each token's loss A r, as a factor, and the gate's metrics."""
    piece = build("gate", table)
    tokens = with_plan(piece, tokens)
    base = -tokens.advantage * (tokens.logp - tokens.logp_old).exp()
    loss, metrics = piece(base, tokens)
    return loss, base.detach(), metrics


def many(count=400, seed=0, **more):
    draw = torch.Generator().manual_seed(seed)
    ratios = torch.exp(0.3 * torch.randn(count, generator=draw, dtype=torch.float64))
    advantage = torch.randn(count, generator=draw, dtype=torch.float64)
    logp = -3 * torch.rand(count, generator=draw, dtype=torch.float64) - 0.01
    sequence = torch.arange(count) // 10
    return tokens_of(
        ratios, advantage, logp=logp, sequence=sequence,
        entropy=2 * torch.rand(count, generator=draw, dtype=torch.float64) + 0.01,
        uniform=token_uniforms(seed, 0, sequence, torch.arange(count) % 10), **more,
    )  # fmt: skip


def test_the_published_covariances():
    tokens = tokens_of([1.0] * 4, [1, 1, -1, -1], logp=[-0.1, -2, -0.1, -3])
    assert covariance(tokens).tolist() == pytest.approx([1.2, -0.7, -1.2, 1.7])


def test_clip_cov_leaves_out_random_candidates_of_the_band():
    tokens = many()
    cov = covariance(tokens)
    inside = (cov > 0.2) & (cov < 1.0)
    loss, base, metrics = gated({"name": "clip-cov", "low": 0.2, "high": 1.0, "fraction": 0.02}, tokens)
    left_out = metrics["left_out"]
    assert left_out.sum() == 8  # int(0.02 * 400)
    assert (left_out & ~inside).sum() == 0 and inside.sum() > 50
    assert (loss[left_out] == 0).all() and torch.equal(loss[~left_out].detach(), base[~left_out])
    drawn_anew = replace(tokens, uniform=1 - tokens.uniform)
    _, _, other = gated({"name": "clip-cov", "low": 0.2, "high": 1.0, "fraction": 0.02}, drawn_anew)
    assert not torch.equal(other["left_out"], left_out)


def test_clip_cov_leaves_tokens_alone_that_the_clip_has_already_removed():
    tokens = many()
    table = {"name": "clip-cov", "low": -9.0, "high": 9.0, "fraction": 1.0, "clip_low": 0.2, "clip_high": 0.2}
    _, _, metrics = gated(table, tokens)
    ratio = (tokens.logp - tokens.logp_old).exp().detach()
    clipped = ((ratio < 0.8) & (tokens.advantage < 0)) | ((ratio > 1.2) & (tokens.advantage > 0))
    assert torch.equal(metrics["left_out"], ~clipped)


def test_kl_cov_holds_the_tokens_of_the_largest_covariance():
    tokens = many()
    loss, base, metrics = gated({"name": "kl-cov", "fraction": 0.05, "coefficient": 0.5}, tokens)
    cov = covariance(tokens)
    expected = torch.zeros(400, dtype=torch.bool)
    expected[cov.argsort(descending=True)[:20]] = True
    assert torch.equal(metrics["held"], expected)
    distance = (tokens.logp - tokens.logp_old).abs().detach()
    torch.testing.assert_close(loss.detach(), base + torch.where(expected, 0.5 * distance, torch.zeros(400)))


def test_kl_cov_holds_exactly_its_share_of_ties_whatever_their_order_and_none_without_signal():
    count = 100
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Forty tokens of the largest covariance, of which ten are held.
    tied = tokens_of([1.0] * count, [1.0] * 40 + [-1.0] * 60, logp=[-0.5] * 40 + [-1.0] * 60, uniform=uniform)
    gate = build("gate", {"name": "kl-cov", "fraction": 0.1})
    held = gate.plan(tied)
    assert int(held.sum()) == 10 and bool(held[:40].any()) and not bool(held[40:].any())
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    assert torch.equal(gate.plan(select(tied, order)), held[order])
    nothing = tokens_of([1.0] * count, [0.0] * count, logp=torch.rand(count) - 2, uniform=uniform)
    assert not bool(gate.plan(nothing).any())


def test_high_entropy_keeps_the_top_fifth_of_the_mini_batch():
    tokens = many()
    loss, base, metrics = gated({"name": "high-entropy"}, tokens)
    order = tokens.entropy.argsort(descending=True)
    assert set(metrics["kept"].nonzero()[:, 0].tolist()) == set(order[:80].tolist())
    torch.testing.assert_close(loss.detach(), torch.where(metrics["kept"], base, torch.zeros(400)))


def test_earl_keeps_the_top_of_each_sample():
    tokens = many()
    _, _, metrics = gated({"name": "earl"}, tokens)
    for sequence in range(40):
        own = tokens.sequence == sequence
        h = tokens.entropy[own]
        assert torch.equal(metrics["kept"][own], h >= h.quantile(0.8))
    assert metrics["kept"].float().mean() == pytest.approx(0.2)


def test_steer_has_the_published_effect():
    tokens = tokens_of([1.0], [1.0], logp=[math.log(0.2)])
    assert entropy_effect(tokens).item() == pytest.approx(0.487550, abs=1e-6)


@pytest.mark.parametrize("shape", ["linear", "exponential"])
def test_steer_weights_equal_a_loop(shape):
    tokens = many()
    effect = []
    for logp, old, a, h in zip(*(v.tolist() for v in (tokens.logp, tokens.logp_old, tokens.advantage, tokens.entropy)),
                               strict=True):  # fmt: skip
        p = math.exp(logp)
        effect.append(abs(a / math.exp(old) * p * (1 - p) * (math.log(p) + h)))
    if shape == "linear":
        expected = [1.2 - (o - min(effect)) / (max(effect) - min(effect)) * 0.4 for o in effect]
    else:
        k = -math.log(0.8) / max(max(effect), 0.02)
        expected = [min(max(math.exp(-k * o), 0.8), 1.0) for o in effect]
    loss, base, metrics = gated({"name": "steer", "shape": shape}, tokens)
    assert metrics["weight"].tolist() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(loss.detach(), base * torch.tensor(expected).double(), atol=1e-6, rtol=1e-5)


def published_scores():
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    h = -(p * p.log()).sum()
    expected = (p.square() * (p.log() + h)).sum()
    return tokens_of([1.0] * 3, [-1.0] * 3, logp=p.log(), entropy=h.expand(3), expected_score=expected.expand(3))


def test_clip_b_and_clip_v_have_the_published_scores():
    tokens = published_scores()
    assert float(tokens.entropy[0]) == pytest.approx(0.801819, abs=1e-6)
    score = discriminator(tokens).detach()
    assert score.tolist() == pytest.approx([0.311601, -0.161524, -0.150077], abs=1e-6)
    assert float(tokens.expected_score[0]) == pytest.approx(0.170808, abs=1e-6)
    assert (tokens.expected_score - score).tolist() == pytest.approx([-0.140793, 0.332332, 0.320885], abs=1e-6)


def test_clip_b_leaves_out_low_scores_of_negative_advantages():
    tokens = many()
    logp, h = tokens.logp.detach(), tokens.entropy
    score = (logp.exp() * (logp + h)).tolist()
    mean, deviation = statistics.mean(score), statistics.pstdev(score)
    left_out = [a < 0 and s - mean < -1.0 * deviation for a, s in zip(tokens.advantage.tolist(), score, strict=True)]
    _, _, metrics = gated({"name": "clip-b", "mu": 1.0}, tokens)
    assert metrics["left_out"].tolist() == left_out
    assert 0 < sum(left_out) < 100


def test_clip_v_leaves_out_at_most_its_share():
    tokens = many(expected_score=torch.linspace(-0.5, 0.5, 400).double())
    distance = (tokens.expected_score - discriminator(tokens)).detach()
    candidates = (tokens.advantage < 0) & (distance > 0.8 * distance.std(correction=0))
    _, _, metrics = gated({"name": "clip-v", "mu": 0.8, "fraction": 0.05}, tokens)
    largest = distance.where(candidates, -torch.inf).argsort(descending=True)[:20]
    assert candidates.sum() > 20
    assert set(metrics["left_out"].nonzero()[:, 0].tolist()) == set(largest.tolist())
    everything = gated({"name": "clip-v", "mu": 0.8, "fraction": 1.0}, tokens)[2]["left_out"]
    assert torch.equal(everything, candidates)


@pytest.mark.parametrize(("anchor", "dropped"), [("behaviour", [1, 1, 0, 0, 0, 0]), ("old", [0, 0, 0, 0, 1, 1])])
def test_opsm_drops_negative_samples_that_were_left_behind(anchor, dropped):
    tokens = tokens_of(
        [1.0] * 6, [-1, -1, 1, 1, -1, -1], sequence=[0, 0, 1, 1, 2, 2], logp=[-2.0] * 6,
        logp_behaviour=torch.tensor([-1.4, -1.4, -0.1, -0.1, -2, -2]).double(),
        logp_old=torch.tensor([-2.0, -2, -0.1, -0.1, -1.2, -1.7]).double(),
    )  # fmt: skip
    loss, _, metrics = gated({"name": "opsm", "anchor": anchor}, tokens)
    assert metrics["dropped"].tolist() == [bool(d) for d in dropped]
    assert (loss[metrics["dropped"]] == 0).all()


def test_otsu_finds_the_gap_between_two_heaps():
    draw = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(60, generator=draw) * 0.1 + 0.3, torch.randn(40, generator=draw) * 0.1 + 2.0])
    threshold = otsu_threshold(values, 100)
    assert values[:60].max() <= float(threshold) < values[60:].min()
    assert otsu_threshold(torch.full((5,), 0.7), 100) == pytest.approx(0.7)
    # every threshold tried, by hand: none separates better
    edges = torch.linspace(values.min(), values.max(), 101)[1:-1]

    def between(edge):
        low, high = values[values < edge], values[values >= edge]
        return len(low) * len(high) * float(low.mean() - high.mean()) ** 2

    best = max(between(edge) for edge in edges)
    assert between(threshold) == pytest.approx(best, rel=0.02)


def test_spine_trains_forking_tokens_and_keeps_their_entropy_in_a_band():
    tokens = many(60)
    loss, base, metrics = gated({"name": "spine", "beta_low": 0.5, "beta_high": 0.25}, tokens)
    for sequence in range(6):
        own = tokens.sequence == sequence
        h = tokens.entropy[own]
        selected = h >= otsu_threshold(h, 100)
        assert torch.equal(metrics["selected"][own], selected)
        high = statistics.median(h[selected].tolist())
        spread = max(1.4826 * statistics.median((h[selected] - high).abs().tolist()), 1e-6)
        low = max(high - spread, 0)
        for value, entropy, keep, plain in zip(loss[own].tolist(), h.tolist(), selected.tolist(), base[own].tolist(),
                                               strict=True):  # fmt: skip
            band = 0.5 * max(low - entropy, 0) + 0.25 * max(entropy - high, 0)
            assert value == pytest.approx(plain + band if keep else 0.0)


def test_median_of_an_even_number_is_between_the_middle_two():
    assert median(torch.tensor([4.0, 1.0, 3.0, 2.0])) == 2.5


IDENTITY_WHERE_NOTHING_MOVED = ["erc", "opsm"]


@pytest.mark.parametrize("name", IDENTITY_WHERE_NOTHING_MOVED)
def test_gates_on_drift_are_the_identity_without_any(name):
    tokens = tokens_of([1.0] * 4, [1.0, -1.0, 2.0, -2.0])
    loss, base, _ = gated({"name": name}, tokens)
    assert torch.equal(loss.detach(), base)
    assert torch.autograd.grad(loss.sum(), tokens.logp)[0].tolist() == [-1.0, 1.0, -2.0, 2.0]


@pytest.mark.parametrize("name", sorted(BUILT_IN["gate"]))
def test_a_gate_makes_no_value_of_a_loss_that_is_zero(name):
    """Held or left out, a token without advantage and drift adds nothing; SPINE's band is its own term."""
    _, tokens = random_tokens(random_batch(), 0)
    tokens = replace(tokens, advantage=torch.zeros_like(tokens.advantage), logp_old=tokens.logp.detach())
    loss, _, _ = gated({"name": name, **({"beta_low": 0.0, "beta_high": 0.0} if name == "spine" else {})}, tokens)
    assert (loss == 0).all()
