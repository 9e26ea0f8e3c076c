"""Verification in one pass gives what the general one gives, and tells what is not a number."""

import numpy as np
import pytest
import torch

from pipeline.sampling.exactness.statistics import chi_square_p_value
from pipeline.sampling.plain import verify_plain
from pipeline.sampling.target import plain_target
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
