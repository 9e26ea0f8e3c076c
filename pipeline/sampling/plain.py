"""Verification in one pass over the logits, for the common case on a CPU: no setting but a temperature, and drafts that
are deterministic, or none.

What is drawn and recorded is what `pipeline.sampling.verification` says; there some thirty tensor operations a step
cost more than a small model's layers.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from pipeline.models.cpu_kernels import FAST, exponential
from pipeline.sampling.uniforms import Stream, uniforms
from pipeline.sampling.verification import VerifiedTokens, packed_rows

_LEAST = np.float32(-87.0)
"""e to less than this is no float32 any more, and taken to be 0"""
_BLOCK = 256
"""tokens whose weights are summed before a draw looks for its own among them"""


def verify_plain(
    logits: Tensor,
    temperatures: np.ndarray,
    token_ids: np.ndarray,
    lengths: np.ndarray,
    seeds: np.ndarray,
    positions: np.ndarray,
    with_entropy: bool = True,
) -> VerifiedTokens:
    """Draws at every scored position, and accepts the draft tokens that were drawn.

    Args:
        logits: float32 [N, V] on the CPU, N = sum(lengths + 1), packed row by row.
        temperatures: float [B], 0: greedy.
        token_ids: drafts, int64 [B, K]; row b holds `lengths[b]` tokens.
        lengths: int64 [B].
        seeds: int64 [B].
        positions: int64 [B], index of each row's next token.
        with_entropy: whether to give entropies.
    """
    row, depth = packed_rows(lengths)
    numbers = uniforms(seeds[row], positions[row] + depth, Stream.SAMPLE)
    shape = len(lengths), int(lengths.max()) + 1
    tokens, accepted = np.full(shape, -1, np.int64), np.zeros(shape[0], np.int64)
    logprobs, entropies = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    _verify(
        logits.contiguous().numpy(), temperatures.astype(np.float32), token_ids, lengths, numbers, tokens, accepted,
        logprobs, entropies,
    )  # fmt: skip
    return VerifiedTokens(
        tokens=torch.from_numpy(tokens),
        accepted=torch.from_numpy(accepted),
        logprobs=torch.from_numpy(logprobs),
        entropies=torch.from_numpy(entropies) if with_entropy else None,
    )


@njit(cache=True)
def _verify(
    logits: np.ndarray,
    temperatures: np.ndarray,
    token_ids: np.ndarray,
    lengths: np.ndarray,
    numbers: np.ndarray,
    tokens: np.ndarray,
    accepted: np.ndarray,
    logprobs: np.ndarray,
    entropies: np.ndarray,
) -> None:
    """Fills the last four; what follows a row's last token stays as it is."""
    size = logits.shape[1]
    first, weights, sums = 0, np.empty(size, np.float32), np.empty((size + _BLOCK - 1) // _BLOCK)
    for b in range(len(lengths)):
        for k in range(lengths[b] + 1):
            token, logprob, entropy = _draw(logits, first + k, temperatures[b], numbers[first + k], weights, sums)
            tokens[b, k], logprobs[b, k], entropies[b, k] = token, logprob, entropy
            if k == lengths[b] or token != token_ids[b, k]:
                accepted[b] = k
                break
        first += lengths[b] + 1


@njit(fastmath=FAST, cache=True)
def _draw(
    logits: np.ndarray, n: int, temperature: float, number: float, weights: np.ndarray, sums: np.ndarray
) -> tuple[int, float, float]:
    """Token, log-prob and entropy (nats) at position n: the token at which the running sum of weights e^(logit / T)
    passes `number` of their total; sums are float64."""
    row, size = logits[n], logits.shape[1]
    inverse = np.float32(1) / np.float32(temperature) if temperature > 0 else np.float32(1)
    greatest = np.float32(-np.inf)
    for v in range(size):
        greatest = max(greatest, row[v])
    total, mean = 0.0, 0.0
    for block in range(len(sums)):
        begin, part, moment = block * _BLOCK, 0.0, 0.0
        for v in range(begin, min(begin + _BLOCK, size)):
            z = (row[v] - greatest) * inverse
            low = z if z > _LEAST else _LEAST
            weight = exponential(low) if z == z else z  # what is not a number stays so, and is noticed
            weights[v] = weight if low == z or z != z else np.float32(0)
            part += np.float64(weights[v])
            moment += np.float64(weights[v] * low)
        sums[block] = part
        total += part
        mean += moment
    token = _first_past(weights, sums, number * total) if temperature > 0 else _first_equal(row, greatest)
    spread = np.log(total)
    return token, (row[token] - greatest) * inverse - spread, spread - mean / total


@njit(cache=True)
def _first_past(weights: np.ndarray, sums: np.ndarray, wanted: float) -> int:
    """The token at which the running sum passes `wanted`; the last of positive weight where rounding lets none."""
    before, block = 0.0, 0
    while block < len(sums) - 1 and before + sums[block] <= wanted:
        before += sums[block]
        block += 1
    last = 0
    for v in range(block * _BLOCK, min((block + 1) * _BLOCK, len(weights))):
        if weights[v] > 0:
            before += weights[v]
            last = v
            if before > wanted:
                break
    return last


@njit(cache=True)
def _first_equal(row: np.ndarray, value: float) -> int:
    for v in range(len(row)):
        if row[v] == value:
            return v
    return 0
