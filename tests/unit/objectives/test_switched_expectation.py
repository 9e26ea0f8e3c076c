"""The corrected gradient under a switching sampler, in expectation, where every response can be listed.

Policy and small model are tables: logits for every prefix. Responses have three tokens of three, so 27 of them, each
with the probability that the switching rule gives it. The expectation is taken over all of them, of the gradient that
corrections, surrogate and aggregation of the learner compute from that response alone, with a fixed baseline.
"""

import copy
import itertools

import pytest
import torch

from learner.pieces import build
from learner.testing import under_logits
from learner.tokens import BatchTokens, MicroBatchTokens
from pipeline.engine.native.switching import SwitchingRule, SwitchState
from pipeline.messages import Sampler

V, T, BASELINE = 3, 3, 0.4
RULES = {
    "published": SwitchingRule(threshold=0.95, window=1, min_run=1),
    "before": SwitchingRule(threshold=0.85, window=1, min_run=1, before_sampling=True),
}
RULE = RULES["published"]
PREFIXES = [prefix for n in range(T) for prefix in itertools.product(range(V), repeat=n)]
ROW = {prefix: row for row, prefix in enumerate(PREFIXES)}
RESPONSES = list(itertools.product(range(V), repeat=T))

draw = torch.Generator().manual_seed(4)
THETA = 1.2 * torch.randn(len(PREFIXES), V, generator=draw, dtype=torch.float64)
SMALL = (0.7 * THETA + 0.9 * torch.randn(len(PREFIXES), V, generator=draw, dtype=torch.float64)).log_softmax(-1)
REWARD = {
    y: float(r) for y, r in zip(RESPONSES, torch.rand(len(RESPONSES), generator=draw).round(decimals=1), strict=True)
}
POLICY = THETA.log_softmax(-1)


@pytest.fixture(params=RULES, autouse=True)
def rule(request):
    """The rule that all of a test is under."""
    global RULE
    RULE = RULES[request.param]


def entropy(law):
    return float(-(law.exp() * law).sum())


def law_of(state, row):
    """Log-probs that the next token is drawn from: of the model at work, after it had its chance to hand over."""
    if state.small and state.hand_over(entropy(SMALL[row])):
        return POLICY[row]
    return (SMALL if state.small else POLICY)[row]


def sampled(response):
    """Log mu of each token [T], and who sampled it, under the rule."""
    state, logp, samplers = SwitchState(RULE), [], []
    for t, token in enumerate(response):
        law = law_of(state, ROW[response[:t]])
        logp.append(law[token])
        samplers.append(Sampler.SWITCHED_MODEL if state.small else Sampler.POLICY)
        state.step(entropy(law))
    return torch.stack(logp), torch.tensor([int(s) for s in samplers])


def gradient(response, corrections):
    """Of the learner's loss of this response, with respect to the policy's table."""
    theta = THETA.clone().requires_grad_()
    logp_behaviour, sampler = sampled(response)
    rows, target = [ROW[response[:t]] for t in range(T)], torch.tensor(response)
    logp_old = POLICY[rows, target]
    none, sequence = torch.zeros(T, dtype=torch.int64), torch.zeros(T, dtype=torch.int64)
    advantage = torch.full((T,), REWARD[response] - BASELINE, dtype=torch.float64)
    batch = BatchTokens(
        logp_old=logp_old, logp_behaviour=logp_behaviour, sequence=sequence, advantage=advantage, age=none,
        sampler=sampler,
    )  # fmt: skip
    weight = torch.ones(T, dtype=torch.float64)
    for table in corrections:
        weight, _ = build("correction", table)(weight, batch)
    tokens = MicroBatchTokens(
        logp=torch.empty(0), entropy=torch.empty(0), logp_old=logp_old, entropy_old=torch.empty(0),
        logp_behaviour=logp_behaviour, advantage=advantage, weight=weight, sequence=sequence,
        coefficient=torch.ones(T, dtype=torch.float64), sampler=sampler,
    )  # fmt: skip
    loss, _ = build("surrogate", {"name": "reinforce"})(under_logits(theta[rows], target, tokens))
    return torch.autograd.grad((loss * weight).sum(), theta)[0]


def expectation(corrections):
    """Over every response, by its probability under the switching sampler."""
    parts = [sampled(y)[0].sum().exp() * gradient(y, corrections) for y in RESPONSES]
    return torch.stack(parts).sum(0)


def on_policy():
    """-d/d theta of the expected reward, by autograd through the sum over responses."""
    theta = THETA.clone().requires_grad_()
    law = theta.log_softmax(-1)
    value = sum(REWARD[y] * torch.stack([law[ROW[y[:t]], y[t]] for t in range(T)]).sum().exp() for y in RESPONSES)
    return torch.autograd.grad(-value, theta)[0]


def with_token_weights():
    """What theory gives for token weights: prefixes as often as the sampler visits them, each token as the policy draws
    it, and behind it the sampler's own continuation. By recursion over prefixes, without a response or a weight."""
    found = torch.zeros_like(THETA)

    def visit(prefix, state, reach):
        """Adds the prefix's share; returns the expected reward under the sampler from here on."""
        if len(prefix) == T:
            return REWARD[prefix]
        row = ROW[prefix]
        law = law_of(state, row).exp()
        value = torch.zeros(V, dtype=torch.float64)
        for token in range(V):
            after = copy.deepcopy(state)
            after.step(entropy(law.log()))
            value[token] = visit((*prefix, token), after, reach * law[token])
        p = POLICY[row].exp()
        advantage = value - BASELINE
        found[row] -= reach * p * (advantage - (p * advantage).sum())  # softmax: E_p[A (onehot - p)]
        return float((law * value).sum())

    visit((), SwitchState(RULE), torch.ones((), dtype=torch.float64))
    return found


SEQUENCE = {"name": "tis", "level": "sequence", "cap": 1e9}


def test_both_models_sample_and_they_differ():
    samplers = torch.stack([sampled(y)[1] for y in RESPONSES])
    assert {0, 1} == set(samplers.flatten().tolist())
    assert sum(float(sampled(y)[0].sum().exp()) for y in RESPONSES) == pytest.approx(1, abs=1e-12)
    ratios = torch.stack([(POLICY - SMALL).exp()]).flatten()
    assert ratios.max() > 2 and ratios.min() < 0.5


def test_sequence_products_without_truncation_give_the_on_policy_gradient():
    assert (expectation([SEQUENCE]) - on_policy()).abs().max() < 1e-6


def test_without_correction_the_gradient_is_another_one():
    assert (expectation([]) - on_policy()).abs().max() > 0.02


def test_token_weights_leave_the_bias_that_theory_gives():
    found = expectation([{"name": "tis", "level": "token", "cap": 1e9}])
    assert (found - with_token_weights()).abs().max() < 1e-6
    assert (found - on_policy()).abs().max() > 1e-3


@pytest.mark.parametrize("cap", [1.05, 1.5, 2.0])
def test_truncation_leaves_the_bias_that_theory_gives(cap):
    """What is cut off: pi(y) - cap mu(y) of every response whose product is above the cap."""
    bias = torch.zeros_like(THETA)
    for y in RESPONSES:
        pi = torch.stack([POLICY[ROW[y[:t]], y[t]] for t in range(T)]).sum().exp()
        excess = (pi - cap * sampled(y)[0].sum().exp()).clamp_min(0)
        for t in range(T):
            score = -POLICY[ROW[y[:t]]].exp()
            score[y[t]] += 1
            bias[ROW[y[:t]]] += excess * (REWARD[y] - BASELINE) * score
    found = expectation([{"name": "tis", "level": "sequence", "cap": cap}])
    assert (found - (on_policy() + bias)).abs().max() < 1e-6
    assert bias.abs().max() > 1e-4


def test_a_mask_on_products_drops_exactly_the_responses_outside_its_band():
    low, high = 0.5, 2.0
    inside = torch.zeros_like(THETA)
    for y in RESPONSES:
        pi = torch.stack([POLICY[ROW[y[:t]], y[t]] for t in range(T)]).sum().exp()
        if low <= pi / sampled(y)[0].sum().exp() <= high:
            for t in range(T):
                score = -POLICY[ROW[y[:t]]].exp()
                score[y[t]] += 1
                inside[ROW[y[:t]]] -= pi * (REWARD[y] - BASELINE) * score
    assert (expectation([{"name": "mis", "low": low, "high": high}]) - inside).abs().max() < 1e-6
