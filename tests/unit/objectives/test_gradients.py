"""Autograd against finite differences in float64 with stop-gradient factors frozen, for every piece of the loss."""

from dataclasses import replace

import pytest
import torch

from learner.gates.spine import median, otsu_threshold
from learner.pieces import BUILT_IN
from learner.testing import random_batch, random_tokens, select, under_logits
from tests.unit.objectives.scenes import FrozenFactors, assert_acts, built, numeric_gradient

VARIANTS = [
    *[(name, {}) for kind in ("surrogate", "gate", "regulariser") for name in BUILT_IN[kind]],
    ("dppo", {"divergence": "kl", "low": 0.01, "high": 0.01}),
    ("steer", {"shape": "exponential"}),
    *[
        ("kl", {"estimator": estimator, "score": score})
        for estimator in ("k1", "k2", "k3", "k3+")
        for score in ("none", "ratio", "policy")
        if (estimator, score) != ("k1", "none")
    ],
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda value: str(value))
def test_autograd_equals_finite_differences(name, options):
    logits, tokens = random_tokens(random_batch(4, samples=4, group_size=4), 4, vocabulary=5)
    index = torch.arange(14)
    logits, tokens = logits.detach()[index], select(tokens, index)
    if name in BUILT_IN["gate"]:
        # Advantages of both signs and entropies that have moved, or gates would have nothing to do.
        signed = torch.where(tokens.sequence == 1, -1.0, 1.0) * (1 + tokens.advantage.abs())
        moved = tokens.entropy.detach() * (1 + 0.04 * torch.linspace(-2, 2, len(index), dtype=torch.float64))
        tokens = replace(tokens, advantage=signed, entropy_old=moved)
    target = logits.log_softmax(-1).sub(tokens.logp.detach()[:, None]).abs().argmin(-1)
    whole = built(name, **options)
    assert_acts(whole, tokens_at(logits, target, tokens))
    plans = whole.plans(tokens_at(logits, target, tokens))

    frozen = FrozenFactors()

    def loss(point):
        with frozen:
            return whole.loss(tokens_at(point, target, tokens), plans)[0]

    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    numeric = numeric_gradient(lambda point: float(loss(point)), logits)
    # SPINE's band begins at the median of its own entropies, where it has a kink.
    smooth = off_the_kink(tokens_at(logits, target, tokens)) if name == "spine" else slice(None)
    torch.testing.assert_close(gradient[smooth], numeric[smooth], atol=2e-8, rtol=1e-6)
    assert float(gradient.abs().max()) > 1e-6


def tokens_at(logits, target, tokens):
    # Built without `detach`, which the frozen factors count.
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return replace(tokens, logp=logprobs.gather(1, target[:, None])[:, 0], entropy=entropy, nucleus_entropy=entropy,
                   expected_score=tokens.expected_score)  # fmt: skip


def off_the_kink(tokens):
    """Tokens whose entropy is not the median of those that SPINE selects in their sample."""
    smooth = torch.ones(len(tokens.sequence), dtype=torch.bool)
    for sequence in tokens.sequence.unique():
        own = tokens.sequence == sequence
        forking = own & (tokens.entropy >= otsu_threshold(tokens.entropy[own], 100))
        smooth[own] = tokens.entropy[own] != median(tokens.entropy[forking])
    assert smooth.float().mean() > 0.6
    return smooth


def test_finite_differences_would_see_a_wrong_gradient():
    """The check itself: a factor that is not frozen, and a gradient that is off by its frozen factor, are seen."""
    point = torch.tensor([0.3, -0.2], dtype=torch.float64)
    frozen = FrozenFactors()

    def loss(x):
        with frozen:
            return (x.detach() * x.exp()).sum()

    leaf = point.clone().requires_grad_()
    (right,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(right, numeric_gradient(lambda x: float(loss(x)), point))
    wrong = numeric_gradient(lambda x: float((x * x.exp()).sum()), point)
    assert not torch.allclose(right, wrong)


def test_the_tokens_of_these_tests_are_under_their_logits():
    logits, tokens = random_tokens(random_batch(), 0)
    target = logits.log_softmax(-1).sub(tokens.logp[:, None]).abs().argmin(-1)
    again = under_logits(logits, target, tokens)
    torch.testing.assert_close(again.logp, tokens.logp)
    distribution = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(tokens.entropy, distribution.entropy())
    p, h = distribution.probs, distribution.entropy()
    torch.testing.assert_close(tokens.expected_score, (p * (p * (p.log() + h[:, None]))).sum(-1).detach())


def test_a_piece_that_does_nothing_would_be_seen():
    _, tokens = random_tokens(random_batch(), 0)
    idle = built("adaptive-entropy")
    idle.regularisers[0]._coefficient = 0.0
    for whole in (idle, built("erc", low=1e-9, high=1e9), built("clip-b", mu=50.0)):
        with pytest.raises(AssertionError, match="do nothing here"):
            assert_acts(whole, tokens)
