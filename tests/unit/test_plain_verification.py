"""Verification in one pass gives what the general one gives, and tells what is not a number."""

import itertools

import numpy as np
import pytest
import torch

from drafters import drawing
from pipeline.sampling.distribution import log_probabilities
from pipeline.sampling.exactness.statistics import chi_square_p_value
from pipeline.sampling.plain import draw_plain, verify_plain
from pipeline.sampling.target import plain_target
from pipeline.sampling.truncation import Truncation, truncate
from pipeline.sampling.verification import TokenUniforms, packed_rows, verify


def batch(vocabulary, rows=12, seed=0):
    """Ragged drafts, of which many are likely tokens, greedy and sampled rows."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4, rows)
    lengths[0] = 0
    row, depth = packed_rows(lengths)
    logits = torch.randn(len(row), vocabulary, generator=torch.Generator().manual_seed(seed)) * 4
    token_ids = rng.integers(0, vocabulary, (rows, int(lengths.max())))
    for n, (b, k) in enumerate(zip(row, depth, strict=True)):
        if k < lengths[b] and rng.random() < 0.7:
            token_ids[b, k] = int(logits[n].argmax())
    temperatures = rng.choice([0.0, 0.6, 1.0], rows).astype(np.float32)
    return logits, temperatures, token_ids, lengths, rng.integers(0, 2**40, rows), rng.integers(0, 99, rows)


@pytest.mark.parametrize("vocabulary", [3, 256, 257, 4096])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_general_verification(vocabulary, seed):
    logits, temperatures, token_ids, lengths, seeds, positions = batch(vocabulary, seed=seed)
    row, _ = packed_rows(lengths)
    target = plain_target(logits, torch.from_numpy(temperatures[row]))
    draws = TokenUniforms.draw(seeds, positions, lengths, False, logits.device)
    wanted = verify(target, token_ids, lengths, draws)
    found = verify_plain(logits, temperatures, token_ids, lengths, seeds, positions)
    assert torch.equal(found.tokens, wanted.tokens) and torch.equal(found.accepted, wanted.accepted)
    assert (found.logprobs - wanted.logprobs).abs().max() < 3e-6
    assert (found.entropies - wanted.entropies).abs().max() < 3e-6
    assert found.accepted.max() > 0 or vocabulary == 3


@pytest.mark.parametrize("vocabulary", [3, 256, 257, 4096])
@pytest.mark.parametrize("seed", range(6))
def test_drafts_with_probabilities_equal_the_general_verification(vocabulary, seed):
    logits, temperatures, token_ids, lengths, seeds, positions = batch(vocabulary, rows=40, seed=seed)
    row, depth = packed_rows(lengths)
    near = torch.randn(*token_ids.shape, vocabulary, generator=torch.Generator().manual_seed(seed))
    for n, (b, k) in enumerate(zip(row, depth, strict=True)):
        if k < lengths[b]:
            near[b, k] = near[b, k] + logits[n]
    q = torch.softmax(near, -1)
    drawn = torch.multinomial(q.flatten(0, 1), 1, generator=torch.Generator().manual_seed(seed)).view(token_ids.shape)
    sampled = np.random.default_rng(seed).random(len(lengths)) < 0.8 if seed % 3 else None
    mine = np.ones(len(lengths), np.bool_) if sampled is None else sampled
    token_ids[mine] = drawn.numpy()[mine]
    q[0, 0] = torch.softmax(logits[1], -1)  # p = q
    target = plain_target(logits, torch.from_numpy(temperatures[row]))
    draws = TokenUniforms.draw(seeds, positions, lengths, True, logits.device)
    wanted = verify(target, token_ids, lengths, draws, q, sampled)
    found = verify_plain(logits, temperatures, token_ids, lengths, seeds, positions, True, q, sampled)
    assert torch.equal(found.tokens, wanted.tokens) and torch.equal(found.accepted, wanted.accepted)
    assert (found.logprobs - wanted.logprobs).abs().max() < 3e-6
    assert (found.entropies - wanted.entropies).abs().max() < 3e-6
    rejected = found.accepted.numpy() < lengths
    assert rejected[mine].any() and (found.accepted.numpy()[mine] > 0).any()


def test_a_draft_and_its_verification_follow_the_softmax():
    p_logits, q_logits = torch.tensor([2.0, -1.0, 0.5, -120.0, 1.0]), torch.tensor([0.0, 2.0, 0.5, 1.0, 1.0])
    rows = 60_000
    seeds, zeros = np.arange(rows), np.zeros(rows, np.int64)
    numbers = np.random.default_rng(5).random(rows)
    drafted, peaks, q = draw_plain(q_logits.expand(rows, -1), np.full(rows, 0.7), np.ones(rows, np.bool_), numbers)
    law = torch.softmax(q_logits.double() / 0.7, 0)
    assert (q - law).abs().max() < 1e-6 and abs(peaks - float(law.max())).max() < 1e-6
    assert chi_square_p_value(np.bincount(drafted, minlength=5), rows * law.numpy()) > 1e-4

    def emitted(stated):
        found = verify_plain(
            p_logits.expand(2 * rows, -1), np.ones(rows, np.float32), drafted[:, None], zeros + 1, seeds, zeros,
            probabilities=stated.unsqueeze(1),
        )  # fmt: skip
        return np.bincount(found.tokens[:, 0].numpy(), minlength=5)

    target = rows * torch.softmax(p_logits.double(), 0).numpy()
    assert emitted(q)[3] == 0
    assert chi_square_p_value(emitted(q), target) > 1e-4
    assert chi_square_p_value(emitted(torch.softmax(q_logits, 0).expand(rows, -1)), target) < 1e-4  # another q


def test_what_draws_on_any_device_draws_the_same():
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.normal(0, 3, (50, 700)).astype(np.float32))
    given = rng.choice([0.5, 1.0], 50), rng.random(50) < 0.7, rng.random(50)
    (tokens, peaks, q), (others, other_peaks, other_q) = draw_plain(logits, *given), drawing._draw(logits, *given)
    assert np.array_equal(tokens, others) and np.allclose(peaks, other_peaks, atol=1e-6)
    assert torch.allclose(q, other_q, atol=1e-6) and len(set(tokens.tolist())) > 20


def test_the_likeliest_is_taken_where_nothing_is_drawn():
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(1))
    tokens, peaks, q = draw_plain(logits, np.full(7, 0.5), np.zeros(7, np.bool_), np.full(7, 0.999))
    assert np.array_equal(tokens, logits.argmax(-1).numpy())
    assert np.allclose(peaks, torch.softmax(logits / 0.5, -1).max(-1).values, atol=1e-6)
    assert torch.allclose(q, torch.softmax(logits / 0.5, -1), atol=1e-6)


def test_draws_follow_the_softmax():
    logits = torch.tensor([[2.0, -1.0, 0.5, -120.0, 1.0, float("-inf")]])
    rows, none = 60_000, np.zeros((60_000, 0), np.int64)
    found = verify_plain(
        logits.expand(rows, -1), np.full(rows, 0.7, np.float32), none, np.zeros(rows, np.int64), np.arange(rows),
        np.zeros(rows, np.int64),
    )  # fmt: skip
    law = torch.softmax(logits[0].double() / 0.7, 0).numpy()
    counts = np.bincount(found.tokens[:, 0].numpy(), minlength=6)
    assert counts[3] == counts[5] == 0
    assert chi_square_p_value(counts, rows * law) > 1e-4
    assert chi_square_p_value(counts, rows * torch.softmax(logits[0].double() / 0.73, 0).numpy()) < 1e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_shows_in_the_log_prob(bad):
    logits = torch.zeros(1, 600)
    logits[0, 500] = bad
    one = np.zeros(1, np.int64)
    found = verify_plain(logits, np.ones(1, np.float32), np.zeros((1, 0), np.int64), one, one, one)
    assert not torch.isfinite(found.logprobs).all()


@pytest.mark.parametrize("size", [40, 3000])
@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0])
def test_the_compiled_draw_truncates_as_the_target_is(size, spread):
    grid = itertools.product((0, 1, 7, 500, 5000), (1.0, 0.999, 0.6, 1e-6), (0.0, 0.01, 0.5, 1.0))
    truncation = Truncation(*(np.array(column) for column in zip(*grid, strict=True)))
    rows = len(truncation.top_k)
    rng = np.random.default_rng(size)
    logits = torch.from_numpy(rng.normal(0, spread, (rows, size)).astype(np.float32))
    logits[::3] = logits[::3].round()  # ties
    temperatures, sampled = rng.uniform(0.4, 2, rows).astype(np.float32), rng.random(rows) < 0.9
    logprobs = log_probabilities(logits, torch.from_numpy(temperatures))
    kept = truncate(logprobs, truncation) | ~torch.from_numpy(sampled)[:, None]
    tokens, peaks, q = draw_plain(logits, temperatures, sampled, rng.random(rows), truncation.table())
    assert torch.equal(q > 0, kept)
    expected = torch.softmax(logprobs.masked_fill(~kept, float("-inf")), -1)
    torch.testing.assert_close(q, expected, rtol=1e-5, atol=1e-7)
    assert kept[range(rows), tokens].all()
    np.testing.assert_allclose(peaks, q.max(1).values, rtol=1e-6)
