"""Drafting and verification in one pass over the logits, for the common case on a CPU: no setting but a temperature,
and no rule but the one that goes token by token.

What is drawn and recorded is what `pipeline.sampling.verification` says; there some thirty tensor operations a step
cost more than a small model's layers.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from pipeline.models.cpu_kernels import FAST, exponential, highest
from pipeline.sampling.uniforms import Stream, uniforms
from pipeline.sampling.verification import VerifiedTokens, packed_rows

_LEAST = np.float32(-87.0)
"""e to less than this is no float32 any more, and taken to be 0"""
_BLOCK = 256
"""tokens whose weights are summed before a draw looks for its own among them"""
_NO_DRAFTS = np.zeros((0, 0, 0), np.float32)
NO_TRUNCATION = np.zeros((0, 3))


def verify_plain(
    logits: Tensor,
    temperatures: np.ndarray,
    token_ids: np.ndarray,
    lengths: np.ndarray,
    seeds: np.ndarray,
    positions: np.ndarray,
    with_entropy: bool = True,
    probabilities: Tensor | None = None,
    sampled: np.ndarray | None = None,
) -> VerifiedTokens:
    """Accepts the longest good prefix of each draft and emits one token more.

    Args:
        logits: float32 [N, V] on the CPU, N = sum(lengths + 1), packed row by row.
        temperatures: float [B], 0: greedy.
        token_ids: drafts, int64 [B, K]; row b holds `lengths[b]` tokens.
        lengths: int64 [B].
        seeds: int64 [B].
        positions: int64 [B], index of each row's next token.
        with_entropy: whether to give entropies.
        probabilities: [B, K, V], what each draft token was drawn from; None: the drafts are deterministic.
        sampled: bool [B], rows whose draft was drawn from `probabilities`; None: all rows.
    """
    row, depth = packed_rows(lengths)
    index = positions[row] + depth
    numbers = uniforms(seeds[row], index, Stream.SAMPLE)
    accepts = residuals = numbers
    drawn, q = np.zeros(len(lengths), np.bool_), _NO_DRAFTS
    if probabilities is not None:
        drawn = np.ones(len(lengths), np.bool_) if sampled is None else sampled
        q = probabilities.float().contiguous().numpy()
        accepts, residuals = (uniforms(seeds[row], index, which) for which in (Stream.ACCEPT, Stream.RESIDUAL))
    shape = len(lengths), int(lengths.max()) + 1
    tokens, accepted = np.full(shape, -1, np.int64), np.zeros(shape[0], np.int64)
    logprobs, entropies = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    _verify(
        logits.contiguous().numpy(), temperatures.astype(np.float32), token_ids, lengths, q, drawn, numbers, accepts,
        residuals, tokens, accepted, logprobs, entropies,
    )  # fmt: skip
    return VerifiedTokens(
        tokens=torch.from_numpy(tokens),
        accepted=torch.from_numpy(accepted),
        logprobs=torch.from_numpy(logprobs),
        entropies=torch.from_numpy(entropies) if with_entropy else None,
    )


def draw_plain(
    logits: Tensor,
    temperatures: np.ndarray,
    sampled: np.ndarray,
    numbers: np.ndarray,
    truncation: np.ndarray = NO_TRUNCATION,
) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Tokens int64 [A], the peaks float32 [A] of the distributions, and these, float32 [A, V].

    Args:
        logits: float32 [A, V] on the CPU.
        temperatures: [A], all above 0.
        sampled: bool [A], rows that draw; the others take the likeliest token.
        numbers: float64 [A] in (0, 1), what is drawn by.
        truncation: float64 [A, 3], of rows that draw (`Truncation.table`); or [0, 3].
    """
    rows = len(logits)
    tokens, peaks = np.zeros(rows, np.int64), np.zeros(rows, np.float32)
    q = np.empty(tuple(logits.shape), np.float32)
    _draw_rows(
        logits.contiguous().numpy(), temperatures.astype(np.float32), sampled, numbers, truncation, tokens, peaks, q
    )
    return tokens, peaks, torch.from_numpy(q)


@njit(cache=True)
def _verify(
    logits: np.ndarray,
    temperatures: np.ndarray,
    token_ids: np.ndarray,
    lengths: np.ndarray,
    q: np.ndarray,
    drawn: np.ndarray,
    numbers: np.ndarray,
    accepts: np.ndarray,
    residuals: np.ndarray,
    tokens: np.ndarray,
    accepted: np.ndarray,
    logprobs: np.ndarray,
    entropies: np.ndarray,
) -> None:
    """Fills the last four; what follows a row's last token stays as it is."""
    size = logits.shape[1]
    first, sums = 0, np.empty((size + _BLOCK - 1) // _BLOCK)
    weights, rest = np.empty(size, np.float32), np.empty(size, np.float32)
    for b in range(len(lengths)):
        temperature = temperatures[b]
        inverse = np.float32(1) / temperature if temperature > 0 else np.float32(1)
        for k in range(lengths[b] + 1):
            n = first + k
            row = logits[n]
            greatest, total, mean = _weigh(row, inverse, weights, sums)
            last, good = k == lengths[b], False
            if last or not drawn[b]:
                token = _choose(row, temperature, greatest, weights, sums, numbers[n] * total)
                good = not last and token == token_ids[b, k]
            else:
                token = token_ids[b, k]
                share = weights[token] / total
                if temperature <= 0:
                    share = 1.0 if token == _first_equal(row, greatest) else 0.0
                good = accepts[n] * q[b, k, token] < share
                if not good:
                    token = _choose(row, temperature, greatest, weights, sums, residuals[n] * total)
                    left = _subtract(weights, total, q[b, k], rest, sums) if temperature > 0 else 0.0
                    if left > 0:  # p = q leaves nothing: rejected by rounding alone, p is the law to fall back on
                        token = _first_past(rest, sums, residuals[n] * left)
            spread = np.log(total)
            tokens[b, k], logprobs[b, k] = token, (row[token] - greatest) * inverse - spread
            entropies[b, k] = spread - mean / total
            if not good:
                accepted[b] = k
                break
        first += lengths[b] + 1


@njit(cache=True)
def _draw_rows(
    logits: np.ndarray,
    temperatures: np.ndarray,
    sampled: np.ndarray,
    numbers: np.ndarray,
    truncation: np.ndarray,
    tokens: np.ndarray,
    peaks: np.ndarray,
    q: np.ndarray,
) -> None:
    """Fills the last three."""
    for n in range(len(logits)):
        top_k, top_p, min_p = 0.0, 1.0, 0.0
        if len(truncation):
            top_k, top_p, min_p = truncation[n]
        tokens[n], peaks[n] = draw_row(logits[n], temperatures[n], sampled[n], numbers[n], q[n], top_k, top_p, min_p)


@njit(cache=True)
def draw_row(
    row: np.ndarray, temperature: float, sampled: bool, number: float, q: np.ndarray, top_k: float, top_p: float,
    min_p: float,
) -> tuple[int, np.float32]:  # fmt: skip
    """Token and peak of one row of `draw_plain`; fills its distribution `q` [V]."""
    sums = np.empty((len(row) + _BLOCK - 1) // _BLOCK)
    greatest, total, _ = _weigh(row, np.float32(1) / temperature, q, sums)
    if sampled and (top_k > 0 or top_p < 1 or min_p > 0):
        total = _truncate(q, total, sums, int(top_k), top_p, min_p)
    token = _choose(row, np.float32(sampled), greatest, q, sums, number * total)
    peak = np.float32(1 / total)
    for v in range(len(row)):
        q[v] *= peak
    return token, peak


@njit(cache=True)
def _truncate(weights: np.ndarray, total: float, sums: np.ndarray, top_k: int, top_p: float, min_p: float) -> float:
    """The sum of what `pipeline.sampling.truncation` leaves of weights [V], the greatest of which is 1; others become
    0, and `sums`, by block, those of what is left."""
    if not total > 0:  # not a number, and to be noticed
        return total
    least = max(np.float32(min_p), np.float32(1e-37))
    if top_k > 0:
        best = _greatest(weights, least, top_k, 0.0)
        least = best[min(top_k, len(best)) - 1]
    if top_p < 1:
        mass = 0.0
        for weight in weights:
            mass += weight if weight >= least else 0.0
        wanted, before, n = top_p * mass, 0.0, 0
        best = _greatest(weights, least, 1, wanted)
        while n < len(best) and (n == 0 or before < wanted):
            least = best[n]
            before += best[n]
            n += 1
    left = 0.0
    for block in range(len(sums)):
        part, some = 0.0, weights[block * _BLOCK : (block + 1) * _BLOCK]
        for v in range(len(some)):
            if some[v] < least:
                some[v] = 0
            part += np.float64(some[v])
        sums[block] = part
        left += part
    return left


@njit(cache=True)
def _greatest(weights: np.ndarray, least: np.float32, count: int, mass: float) -> np.ndarray:
    """The greatest weights float32 of at least `least`, descending: `count` of them, of `mass` together, and some more;
    or all. What is sorted is mostly a small part."""
    bound, found, summed = np.float32(1 / 16), 0, 0.0
    while True:
        bound = max(bound, least)
        found, summed = 0, 0.0
        for weight in weights:
            if weight >= bound:
                found += 1
                summed += weight
        if bound == least or (found >= count and summed >= mass):
            break
        bound /= np.float32(64)
    chosen, n = np.empty(found, np.float32), 0
    for weight in weights:
        if weight >= bound:
            chosen[n] = weight
            n += 1
    return np.sort(chosen)[::-1]


@njit(fastmath=FAST, cache=True)
def _weigh(row: np.ndarray, inverse: float, weights: np.ndarray, sums: np.ndarray) -> tuple[np.float32, float, float]:
    """The greatest logit, the sum of the weights e^((logit - greatest) / T), and that of weight times exponent; fills
    `weights` [V] and their sums by block, float64."""
    greatest = highest(row)
    total, mean = 0.0, 0.0
    for block in range(len(sums)):
        part, moment = 0.0, 0.0
        # slices: loops over parts of an array by its own indices become no vector instructions
        some, filled = row[block * _BLOCK : (block + 1) * _BLOCK], weights[block * _BLOCK : (block + 1) * _BLOCK]
        for v in range(len(some)):
            z = (some[v] - greatest) * inverse
            low = z if z > _LEAST else _LEAST
            weight = exponential(low) if z == z else z  # what is not a number stays so, and is noticed
            filled[v] = weight if low == z or z != z else np.float32(0)
            part += np.float64(filled[v])
            moment += np.float64(filled[v] * low)
        sums[block] = part
        total += part
        mean += moment
    return greatest, total, mean


@njit(fastmath=FAST, cache=True)
def _subtract(weights: np.ndarray, total: float, q: np.ndarray, rest: np.ndarray, sums: np.ndarray) -> float:
    """The sum of max(p - q, 0) for p = weights / total; fills `rest` [V] and its sums by block."""
    share, left = np.float32(1 / total), 0.0
    for block in range(len(sums)):
        begin, end, part = block * _BLOCK, (block + 1) * _BLOCK, 0.0
        some, without, filled = weights[begin:end], q[begin:end], rest[begin:end]
        for v in range(len(some)):
            difference = some[v] * share - without[v]
            filled[v] = difference if difference > 0 else np.float32(0)
            part += np.float64(filled[v])
        sums[block] = part
        left += part
    return left


@njit(cache=True)
def _choose(
    row: np.ndarray, temperature: float, greatest: float, weights: np.ndarray, sums: np.ndarray, wanted: float
) -> int:
    """The token at which the running sum of weights passes `wanted`; at temperature 0 the likeliest."""
    return _first_past(weights, sums, wanted) if temperature > 0 else _first_equal(row, greatest)


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
