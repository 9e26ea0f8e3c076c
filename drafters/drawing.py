"""Draft tokens drawn one after the other from a model's distributions: what drafters that run a model share.

Whatever ends a draft looks at distributions and at tokens that are in it, never at one that it then leaves out: a token
that stands in a draft only where it looks good is not drawn from the distribution that is stated for it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from drafters.base import DraftRequest, Proposal
from pipeline.sampling.distribution import inverse_cdf, log_probabilities
from pipeline.sampling.plain import NO_TRUNCATION, draw_plain
from pipeline.sampling.splitmix import one_salted_seed, one_uniform
from pipeline.sampling.truncation import Truncation, truncate
from pipeline.sampling.uniforms import Stream, salted, stream_offset, uniforms

_MAX_DRAFT_BITS = 16
_OFFSET = stream_offset(Stream.DRAFT)


class Wanted(NamedTuple):
    """Drafts that are drawn in one call, for A rows."""

    temperatures: np.ndarray
    """float32 [A], all above 0"""
    sampled: np.ndarray
    """bool [A], rows that draw; the others take the likeliest token"""
    numbers: np.ndarray
    """float64 [A, K] in (0, 1), what is drawn by"""
    budgets: np.ndarray
    """int64 [A], most tokens of each, 1 to K"""
    truncation: np.ndarray
    """float64 [A, 3], top-k, top-p and min-p of rows that draw; or [0, 3]"""
    stop_below: float
    """a draft ends with the first token that was drawn from a distribution with a lower peak"""


class Chained(NamedTuple):
    """What was drawn."""

    tokens: np.ndarray
    """int64 [A, K]"""
    lengths: np.ndarray
    """int64 [A]"""
    peaks: np.ndarray
    """float32 [A, K], of the distributions"""
    probabilities: Tensor
    """float32 [A, K, V], the distributions; nothing of meaning behind a row's length"""


def draw_whole(
    draw: Callable[[Wanted], Chained],
    request: DraftRequest,
    budgets: np.ndarray,
    seeds: np.ndarray,
    positions: np.ndarray,
    *,
    greedy: bool,
    stop_below: float,
) -> Proposal:
    """What `Drawing` draws token by token, from one call for all rows that want a draft; at least one must.

    Args:
        draw: gives the drafts of these rows.
        request, budgets, seeds, positions, greedy, stop_below: as `Drawing` takes them.
    """
    rows = len(budgets)
    ids = np.asarray(request.ids, np.int64)
    wanting, warm, sampled, numbers, most = _wanted(seeds, ids, positions, request.temperatures, budgets, greedy)
    truncation = NO_TRUNCATION if request.truncation is None else request.truncation.take(wanting).table()
    found = draw(Wanted(warm, sampled, numbers, most, truncation, stop_below))
    depth = int(found.lengths.max())
    tokens, lengths, peaks, q = found.tokens, found.lengths, found.peaks, found.probabilities
    if depth < tokens.shape[1]:
        tokens, peaks, q = tokens[:, :depth], peaks[:, :depth], q[:, :depth]
    if len(wanting) < rows:
        tokens, lengths, peaks, sampled = (_spread(part, wanting, rows) for part in (tokens, lengths, peaks, sampled))
        q = q.new_zeros(rows, *q.shape[1:]).index_copy_(0, torch.from_numpy(wanting), q)
    if not sampled.any():
        return Proposal(tokens, lengths, confidences=peaks)
    return Proposal(tokens, lengths, q, None, sampled, confidences=peaks)


def _spread(part: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """[count, ...] with the part [A, ...] in these rows and zeros elsewhere."""
    whole = np.zeros((count, *part.shape[1:]), part.dtype)
    whole[rows] = part
    return whole


@njit(cache=True)
def _wanted(
    seeds: np.ndarray,
    ids: np.ndarray,
    positions: np.ndarray,
    temperatures: np.ndarray,
    budgets: np.ndarray,
    greedy: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows int64 [A] with a budget, then the first four fields of `Wanted`."""
    rows = np.flatnonzero(budgets > 0)
    sampled, warm = np.empty(len(rows), np.bool_), np.empty(len(rows), np.float32)
    numbers = np.empty((len(rows), budgets.max()))
    for n, row in enumerate(rows):
        sampled[n] = temperatures[row] > 0 and not greedy
        warm[n] = temperatures[row] if temperatures[row] > 0 else np.float32(1)
        seed = one_salted_seed(np.uint64(seeds[row]), np.uint64(ids[row] + 1))
        for k in range(numbers.shape[1]):
            numbers[n, k] = one_uniform(seed, np.uint64((positions[row] << _MAX_DRAFT_BITS) + k), _OFFSET)
    return rows, warm, sampled, numbers, budgets[rows]


class Drawing:
    """The drafts of B rows while they grow, one depth at a time.

    Attributes:
        rows: int64 [A], rows that want a further token.
    """

    def __init__(
        self,
        request: DraftRequest,
        budgets: np.ndarray,
        seeds: np.ndarray,
        positions: np.ndarray,
        *,
        vocab_size: int,
        greedy: bool = False,
        stop_below: float = 0.0,
    ) -> None:
        """
        Args:
            request: of the B rows.
            budgets: int64 [B], most tokens of each, at most the request's.
            seeds: int64 [B], of the sequences.
            positions: int64 [B], tokens that each sequence has.
            vocab_size: of the target.
            greedy: whether rows of every temperature take the likeliest token, which makes their draft deterministic.
            stop_below: a draft ends with the first token that was drawn from a distribution with a lower peak.
        """
        self._budgets, self._positions, self._greedy, self._stop_below = budgets, positions, greedy, stop_below
        # Two sequences may have one seed, and what one of them emitted may shape what the other drafts from.
        self._seeds = salted(seeds, np.asarray(request.ids, np.int64) + 1)
        self._temperatures, self._vocab_size = request.temperatures, vocab_size
        self._sampled = np.zeros(len(budgets), np.bool_) if greedy else request.temperatures > 0
        self._truncation = None if greedy else request.truncation
        width = int(budgets.max(initial=0))
        self._tokens, self._lengths = np.zeros((len(budgets), width), np.int64), np.zeros(len(budgets), np.int64)
        self._confidences = np.zeros((len(budgets), width), np.float32)
        self._drawn: list[tuple[np.ndarray, Tensor]] = []
        self.rows = np.flatnonzero(budgets > 0)
        self.depth = 0

    def draw(self, logits: Tensor) -> np.ndarray:
        """The next token int64 [A] of `rows`, which are then those that want one more.

        Args:
            logits: float32 [A, a vocabulary]; ids beyond the target's vocabulary are left out.
        """
        rows, depth, sampled = self.rows, self.depth, self._sampled[self.rows]
        logits = logits[:, : self._vocab_size]
        temperatures = np.where(self._temperatures > 0, self._temperatures, 1)[rows]
        # Counted from where this draft starts: no number is met twice, though positions are.
        numbers = uniforms(self._seeds[rows], (self._positions[rows] << _MAX_DRAFT_BITS) + depth, Stream.DRAFT)
        truncation = None if self._truncation is None else self._truncation.take(rows)
        if logits.device.type == "cpu" and logits.dtype == torch.float32:
            table = NO_TRUNCATION if truncation is None else truncation.table()
            tokens, confidences, q = draw_plain(logits, temperatures, sampled, numbers, table)
        else:
            if truncation is not None:
                logits = _truncated(logits, temperatures, sampled, truncation)
            tokens, confidences, q = _draw(logits, temperatures, sampled, numbers)
        if sampled.any():
            self._drawn.append((rows, q))
        self._tokens[rows, depth], self._confidences[rows, depth] = tokens, confidences
        self._lengths[rows] = self.depth = depth + 1
        self.rows = rows[(self._budgets[rows] > self.depth) & (confidences >= self._stop_below)]
        return tokens

    def proposal(self) -> Proposal:
        """What has been drawn."""
        width = self.depth
        return Proposal(
            self._tokens[:, :width],
            self._lengths,
            self._probabilities(width),
            sampled=self._sampled if self._drawn else None,
            confidences=self._confidences[:, :width],
        )

    def _probabilities(self, width: int) -> Tensor | None:
        """[B, width, V]"""
        if not self._drawn:
            return None
        rows = len(self._lengths)
        if all(len(which) == rows for which, _ in self._drawn) and len(self._drawn) == width:
            q = torch.stack([part for _, part in self._drawn], 1)
        else:
            first = self._drawn[0][1]
            q = first.new_zeros(rows, width, first.shape[1])
            for depth, (which, part) in enumerate(self._drawn):
                q[torch.from_numpy(which).to(q.device), depth] = part
        missing = self._vocab_size - q.shape[2]
        return torch.nn.functional.pad(q, (0, missing)) if missing else q


def _truncated(logits: Tensor, temperatures: np.ndarray, sampled: np.ndarray, truncation: Truncation) -> Tensor:
    """Logits [A, V] with minus infinity for what the target would leave out of such distributions."""
    rows = np.flatnonzero(sampled & truncation.on)
    if not len(rows):
        return logits
    where = torch.from_numpy(rows).to(logits.device)
    some = logits[where]
    logprobs = log_probabilities(some, torch.from_numpy(temperatures[rows]).to(logits.device))
    mask = truncate(logprobs, truncation.take(rows))
    return logits.index_copy(0, where, some.masked_fill(~mask, float("-inf")))


def _draw(
    logits: Tensor, temperatures: np.ndarray, sampled: np.ndarray, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """As `draw_plain`, on any device."""

    def there(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(logits.device)

    q = torch.softmax(logits / there(temperatures.astype(np.float32)).unsqueeze(1), -1)
    peak, token = q.max(-1)
    if sampled.any():
        token = torch.where(there(sampled), inverse_cdf(q, there(numbers)), token)
    return token.cpu().numpy(), peak.cpu().numpy(), q
