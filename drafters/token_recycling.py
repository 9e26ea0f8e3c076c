"""Token Recycling: the token that the target itself thought likeliest the last time it stood at this token.

After Luo et al. (arXiv 2408.08696), in its chain form: the paper keeps the eight likeliest successors of every token
and drafts a fixed tree of them; a chain needs the first alone. The paper also learns from rejected draft tokens; here
only emitted ones count, whoever drafted them.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta, Struct
from numba import njit

from drafters.base import BaseDrafter, DraftRequest, Needs, Proposal, SequenceStart, Verified
from drafters.slots import Slots, with_room

_BLOCK = 256
"""logits whose largest is found in one go, with whole vectors"""


class TokenRecyclingDrafter(BaseDrafter):
    """Chains each token's likeliest successor, as the target last saw it; no training, kept across sequences."""

    name = "token-recycling"
    needs = Needs.LOGITS

    class Options(Struct, kw_only=True, forbid_unknown_fields=True):
        """`max_tokens` bounds the draft."""

        max_tokens: Annotated[int, Meta(ge=1)] = 6

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or self.Options()
        self._successors = np.zeros(0, np.int64)
        """[V], -1 where the token has not been met"""
        self._slots = Slots()
        self._last = np.zeros(0, np.int64)
        """newest token of each slot"""
        likeliest(
            np.zeros((1, 1), np.float32), np.zeros(1, np.int64), np.zeros(2, np.int64)
        )  # compiled before it counts

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        for start in sequences:
            if start.id not in self._slots:
                slot = self._slots.take(start.id)
                self._last = with_room(self._last, slot + 1)
                self._last[slot] = start.prompt_ids[-1]

    def propose(self, request: DraftRequest) -> Proposal:
        return Proposal(
            *_chained(
                self._successors, self._last, self._slots.of(request.ids), request.budgets, self.options.max_tokens
            )
        )

    def observe(self, verified: Verified) -> None:
        tokens, borders = verified.flat()
        slots = self._slots.of(verified.ids)
        if verified.logits is None or verified.starts is None:
            self._last[slots] = [
                emitted[-1] if len(emitted) else self._last[slot]
                for slot, emitted in zip(slots.tolist(), verified.emitted, strict=True)
            ]
            return
        if not len(self._successors):
            self._successors = np.full(verified.logits.shape[1], -1, np.int64)
        if verified.logits.device.type == "cpu":
            best = likeliest(verified.logits.float().contiguous().numpy(), verified.starts.copy(), borders)
        else:
            counts = np.diff(borders)
            places = np.concatenate([np.arange(n) for n in counts]) + np.repeat(verified.starts, counts)
            best = verified.logits[torch.from_numpy(places).to(verified.logits.device)].argmax(-1).cpu().numpy()
        _learn(self._successors, self._last, slots, tokens, borders, best)

    def end(self, ids: Sequence[int]) -> None:
        for i in ids:
            self._slots.free(i)


@njit(cache=True)
def _chained(
    successors: np.ndarray, last: np.ndarray, slots: np.ndarray, budgets: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int64 [B, K] and lengths int64 [B]."""
    width = 0
    for b in range(len(slots)):
        width = max(width, min(budgets[b], most))
    tokens, lengths = np.zeros((len(slots), width), np.int64), np.zeros(len(slots), np.int64)
    for b in range(len(slots) if len(successors) else 0):
        token = successors[last[slots[b]]]
        while token >= 0 and lengths[b] < min(budgets[b], most):
            tokens[b, lengths[b]] = token
            lengths[b] += 1
            token = successors[token]
    return tokens, lengths


@njit(cache=True, fastmath={"nnan", "nsz"})
def _largest(values: np.ndarray) -> float:
    most = values[0]
    for value in values:
        most = value if value > most else most
    return most


@njit(cache=True)
def likeliest(logits: np.ndarray, starts: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """Index int64 [N] of the largest logit at each place that an emitted token was sampled from; the first of equals.

    Args:
        logits: float32 [M, V].
        starts: int64 [B], where each row's places begin.
        borders: int64 [B + 1], where each row's N tokens begin and end.
    """
    best = np.zeros(borders[-1], np.int64)
    for b in range(len(starts)):
        for k in range(borders[b + 1] - borders[b]):
            row, most, block = logits[starts[b] + k], -np.inf, 0
            for begin in range(0, len(row), _BLOCK):
                largest = _largest(row[begin : begin + _BLOCK])
                if largest > most:
                    most, block = largest, begin
            while row[block] < most:
                block += 1
            best[borders[b] + k] = block
    return best


@njit(cache=True)
def _learn(
    successors: np.ndarray, last: np.ndarray, slots: np.ndarray, tokens: np.ndarray, borders: np.ndarray,
    best: np.ndarray,
) -> None:  # fmt: skip
    """`best[i]` is what the target thought likeliest where it sampled `tokens[i]`."""
    for b in range(len(slots)):
        for i in range(borders[b], borders[b + 1]):
            successors[last[slots[b]]] = best[i]
            last[slots[b]] = tokens[i]
