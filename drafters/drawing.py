"""Draft tokens drawn one after the other from a model's distributions: what drafters that run a model share.

Whatever ends a draft looks at distributions and at tokens that are in it, never at one that it then leaves out: a token
that stands in a draft only where it looks good is not drawn from the distribution that is stated for it.
"""

from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from drafters.base import DraftRequest, Proposal
from pipeline.sampling.distribution import inverse_cdf
from pipeline.sampling.plain import draw_plain
from pipeline.sampling.uniforms import Stream, salted, uniforms

_MAX_DRAFT_BITS = 16


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
    """float32 [A, K, V], the distributions; zeros behind a row's length"""


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
        if logits.device.type == "cpu" and logits.dtype == torch.float32:
            tokens, confidences, q = draw_plain(logits, temperatures, sampled, numbers)
        else:
            tokens, confidences, q = _draw(logits, temperatures, sampled, numbers)
        if sampled.any():
            self._drawn.append((rows, q))
        self._tokens[rows, depth], self._confidences[rows, depth] = tokens, confidences
        self._lengths[rows] = self.depth = depth + 1
        self.rows = rows[(self._budgets[rows] > self.depth) & (confidences >= self._stop_below)]
        return tokens

    def whole(self, draw: Callable[[Wanted], Chained]) -> Proposal:
        """All of it in one call, for `rows`."""
        rows, depths = self.rows, np.arange(self._tokens.shape[1])
        temperatures = np.where(self._temperatures > 0, self._temperatures, 1)[rows]
        positions = (self._positions[rows, None] << _MAX_DRAFT_BITS) + depths
        numbers = uniforms(self._seeds[rows, None], positions, Stream.DRAFT)
        sampled = self._sampled[rows]
        wanted = temperatures.astype(np.float32), sampled, numbers, self._budgets[rows], self._stop_below
        found = draw(Wanted(*wanted))
        self._tokens[rows], self._lengths[rows], self._confidences[rows] = found.tokens, found.lengths, found.peaks
        self.depth, self.rows = int(found.lengths.max()), rows[:0]
        proposal = self.proposal()
        if not sampled.any():
            return proposal
        q = found.probabilities[:, : self.depth]
        if len(rows) < len(self._lengths):
            q = q.new_zeros(len(self._lengths), *q.shape[1:]).index_copy_(0, torch.from_numpy(rows), q)
        return msgspec.structs.replace(proposal, probabilities=q, sampled=self._sampled)

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
