"""A policy of which everything can be written down, sampled by one that has forgotten part of the text: what each
correction's expected gradient is, enumerated through the learner's pieces and derived along the tree of prefixes."""

import itertools
from dataclasses import replace

import pytest
import torch

from learner.tokens import BatchTokens
from tests.unit.objectives.scenes import objective, tokens_of

VOCABULARY, LENGTH, BASELINE = 3, 3, 0.4
TEXTS = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
PREFIXES = [p for n in range(LENGTH) for p in itertools.product(range(VOCABULARY), repeat=n)]
rng = torch.Generator().manual_seed(11)
TABLE = 1.2 * torch.randn(len(PREFIXES), VOCABULARY, generator=rng, dtype=torch.float64)
REWARDS = torch.rand(len(TEXTS), generator=rng, dtype=torch.float64)


def row(prefix):
    return PREFIXES.index(tuple(prefix))


def seen(prefix):
    """What is left of a prefix once only its latest token is cached."""
    return (0,) * (len(prefix) - 1) + tuple(prefix[-1:])


def policy(table=TABLE):
    """log pi(. | prefix), [prefix, V]"""
    return table.log_softmax(-1)


MU = torch.stack([policy()[row(seen(p))] for p in PREFIXES]).exp()
"""[prefix, V]: the same weights, looking at less"""
PI = policy().exp()


def of_tokens(law):
    """[text, place], the law's entry of every token."""
    return torch.stack([torch.stack([law[row(y[:t]), y[t]] for t in range(LENGTH)]) for y in TEXTS])


def enumerated(corrections):
    """Expectation under mu of the loss's gradient, with the sign of the return's: every text once, its loss times its
    probability."""
    table = TABLE.clone().requires_grad_()
    logp = of_tokens(policy(table)).flatten()
    sequence = torch.arange(len(TEXTS)).repeat_interleave(LENGTH)
    advantage = (REWARDS - BASELINE).repeat_interleave(LENGTH)
    behaviour = of_tokens(MU).log().flatten()
    whole = objective(surrogate={"name": "ppo-clip"}, corrections=corrections)
    nothing = torch.zeros(len(logp), dtype=torch.int64)
    batch = BatchTokens(logp_old=logp.detach(), logp_behaviour=behaviour, sequence=sequence, advantage=advantage,
                        age=nothing, sampler=nothing + 2)  # fmt: skip
    weight, _ = whole.weights(batch)
    tokens = replace(
        tokens_of([1.0] * len(logp), advantage), logp=logp, logp_old=logp.detach(), logp_behaviour=behaviour,
        sequence=sequence, weight=weight, coefficient=of_tokens(MU).prod(1).repeat_interleave(LENGTH),
    )  # fmt: skip
    loss, _ = whole.loss(tokens)
    return -torch.autograd.grad(loss, table)[0]


def on_policy():
    """d/d table of sum_y pi(y) (R(y) - baseline)"""
    table = TABLE.clone().requires_grad_()
    value = (of_tokens(policy(table)).sum(1).exp() * (REWARDS - BASELINE)).sum()
    return torch.autograd.grad(value, table)[0]


def along_the_tree(sampled):
    """sum over prefixes s of mu(s) sum_v sampled(s)_v Q_mu(s, v) grad log pi(v | s): states are visited, and responses
    go on, under mu; only the choice of the token itself has the weights `sampled` [prefix, V]."""
    gradient = torch.zeros_like(TABLE)
    for prefix in PREFIXES:
        s = row(prefix)
        for v in range(VOCABULARY):
            score = -PI[s].clone()
            score[v] += 1
            gradient[s] += visits(prefix) * sampled[s, v] * q_of(prefix, v) * score
    return gradient


def visits(prefix):
    chance = 1.0
    for t, token in enumerate(prefix):
        chance *= float(MU[row(prefix[:t]), token])
    return chance


def q_of(prefix, v):
    """E_mu[R - baseline | prefix, v]"""
    text = (*prefix, v)
    if len(text) == LENGTH:
        return float(REWARDS[TEXTS.index(text)]) - BASELINE
    return sum(float(MU[row(text), w]) * q_of(text, w) for w in range(VOCABULARY))


def test_sequence_products_give_the_on_policy_gradient():
    found = enumerated([{"name": "tis", "level": "sequence", "cap": 1e6}])
    torch.testing.assert_close(found, on_policy(), atol=1e-6, rtol=0)
    uncorrected = enumerated([])
    assert (uncorrected - on_policy()).abs().max() > 1e-3
    torch.testing.assert_close(uncorrected, along_the_tree(MU), atol=1e-6, rtol=0)


def test_token_weights_leave_visited_states_and_continuations_the_samplers():
    found = enumerated([{"name": "tis", "cap": 1e6}])
    torch.testing.assert_close(found, along_the_tree(PI), atol=1e-6, rtol=0)
    assert (found - on_policy()).abs().max() > 1e-3


@pytest.mark.parametrize("cap", [1.1, 1.5])
def test_truncation_lowers_a_tokens_share_to_what_the_cap_leaves(cap):
    found = enumerated([{"name": "tis", "cap": cap}])
    assert (cap * MU < PI).any()
    torch.testing.assert_close(found, along_the_tree(torch.minimum(PI, cap * MU)), atol=1e-6, rtol=0)


def test_sparse_rls_band_leaves_the_tokens_inside_it():
    inside = (PI / MU >= 0.5) & (PI / MU <= 1.5)
    assert inside.any() and not inside.all()
    found = enumerated([{"name": "icepop", "low": 0.5, "high": 1.5}])
    torch.testing.assert_close(found, along_the_tree(torch.where(inside, PI, 0.0)), atol=1e-6, rtol=0)


def test_truncated_products_count_a_text_at_most_cap_times_as_often_as_it_was_sampled():
    cap = 1.3
    table = TABLE.clone().requires_grad_()
    chances, sampled = of_tokens(PI).prod(1), of_tokens(MU).prod(1)
    assert (chances > cap * sampled).any()
    logp = of_tokens(policy(table)).sum(1)
    value = (torch.minimum(chances, cap * sampled) * (REWARDS - BASELINE) * logp).sum()
    found = enumerated([{"name": "tis", "level": "sequence", "cap": cap}])
    torch.testing.assert_close(found, torch.autograd.grad(value, table)[0], atol=1e-6, rtol=0)


def test_a_veto_takes_whole_texts_out_of_the_expectation():
    ratios = of_tokens(PI) / of_tokens(MU)
    smallest = ratios.min(1).values
    low = float(smallest[smallest < 1].median()) * (1 + 1e-6)  # on no ratio
    kept = smallest >= low
    assert 0 < int(kept.sum()) < len(kept)
    table = TABLE.clone().requires_grad_()
    tokens = of_tokens(policy(table))
    value = (of_tokens(MU).prod(1) * kept * (REWARDS - BASELINE) * (ratios * tokens).sum(1)).sum()
    found = enumerated([{"name": "veto", "low": low}, {"name": "tis", "cap": 1e6}])
    torch.testing.assert_close(found, torch.autograd.grad(value, table)[0], atol=1e-6, rtol=0)
