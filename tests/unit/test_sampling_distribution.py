import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from pipeline.sampling.distribution import entropy, inverse_cdf, log_probabilities

weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1e3)), min_size=1, max_size=30).filter(lambda w: sum(w) > 0)


@given(weights, st.floats(2.0**-60, 1 - 2.0**-53))
def test_inverse_cdf_returns_the_token_whose_interval_holds_the_number(w, u):
    token = int(inverse_cdf(torch.tensor([w], dtype=torch.float64), torch.tensor([u], dtype=torch.float64)))
    assert w[token] > 0
    total = sum(w)
    assert sum(w[:token]) <= u * total + 1e-9 * total
    assert sum(w[: token + 1]) >= u * total - 1e-9 * total


@given(weights)
def test_extreme_numbers_return_the_first_and_last_possible_token(w):
    row = torch.tensor([w, w], dtype=torch.float64)
    first, last = inverse_cdf(row, torch.tensor([5e-324, 1.0], dtype=torch.float64)).tolist()
    possible = np.flatnonzero(w)
    # A token that rounding of the running sum swallows cannot come out at the very end.
    running = np.cumsum(w)
    assert first == possible[0]
    assert last == int(np.argmax(running == running[-1])) and w[last] > 0


@pytest.mark.parametrize("vocabulary", [513, 1024, 5000])
def test_a_wide_vocabulary_is_searched_as_by_its_running_sum(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    w = torch.rand(2000, vocabulary, generator=generator) * (torch.rand(2000, vocabulary, generator=generator) < 0.02)
    w[:, vocabulary // 2] += 1e-6
    u = torch.rand(2000, dtype=torch.float64, generator=generator)
    u[:4] = torch.tensor([1e-300, 2.0**-53, 1 - 2.0**-53, 1.0])
    tokens = inverse_cdf(w, u)
    running = w.double().cumsum(-1)
    expected = torch.searchsorted(running, (u * running[:, -1]).unsqueeze(1), right=True).squeeze(1)
    index = torch.arange(2000)
    assert (w[index, tokens] > 0).all()
    assert torch.equal(tokens[4:], expected[4:])
    assert torch.equal(tokens[:2], (w > 0).int().argmax(1)[:2])
    assert torch.equal(tokens[2:4], vocabulary - 1 - (w > 0).int().flip(1).argmax(1)[2:4])


def test_small_tail_probabilities_are_kept_in_float32():
    p = torch.full((1, 50_000), 1e-9)
    p[0, 0] = 1.0
    total = p.double().sum()
    number = (p[0, :40_001].double().sum() / total).view(1)
    assert abs(int(inverse_cdf(p, number)) - 40_000) <= 1


def test_log_probabilities_and_entropy_equal_scipy():
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 4, (6, 40)))
    temperatures = torch.tensor([0.0, 0.1, 0.6, 1.0, 1.0, 2.5])
    divisor = np.array([1.0, np.float32(0.1), np.float32(0.6), 1, 1, 2.5])[:, None]
    expected = special.log_softmax(logits.numpy() / divisor, axis=1)
    logp = log_probabilities(logits, temperatures)
    np.testing.assert_allclose(logp.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(entropy(logp.exp(), logp), stats.entropy(np.exp(expected), axis=1), atol=1e-12)
    assert log_probabilities(logits.bfloat16(), temperatures).dtype == torch.float32


def test_entropy_of_a_certain_token_is_zero():
    logits = torch.tensor([[0.0, float("-inf"), float("-inf")]])
    logp = log_probabilities(logits, torch.ones(1))
    assert entropy(logp.exp(), logp).item() == 0
