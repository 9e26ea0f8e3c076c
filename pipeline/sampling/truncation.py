"""Which tokens min-p, top-k and top-p leave to draw from."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

_CANDIDATES, _GROWTH = 256, 16
"""Most likely tokens that are sorted first, enough for the nucleus of all but flat distributions; those get more, step
by step, since sorting a whole vocabulary costs more than many a model's forward pass."""


class Setting(Protocol):
    """Of one sequence; `pipeline.messages.SamplingParams` is one, and so is vLLM's."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...


class Truncation(NamedTuple):
    """Settings of R rows."""

    top_k: np.ndarray
    """int64 [R], 0: off"""
    top_p: np.ndarray
    """float64 [R], 1: off"""
    min_p: np.ndarray
    """float64 [R], 0: off"""

    @staticmethod
    def of(settings: Sequence[Setting]) -> "Truncation | None":
        """Of a setting a row, off where it is greedy; None where all are off."""
        rows = [(max(0, s.top_k), s.top_p, s.min_p) if s.temperature > 0 else _OFF for s in settings]
        if all(row == _OFF for row in rows):
            return None
        top_k, top_p, min_p = zip(*rows, strict=True)
        return Truncation(np.array(top_k, np.int64), np.array(top_p, np.float64), np.array(min_p, np.float64))

    @property
    def on(self) -> np.ndarray:
        """bool [R]"""
        return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)

    def table(self) -> np.ndarray:
        """float64 [R, 3], top-k, top-p and min-p of each row."""
        return np.array(self, np.float64).T.copy()

    def take(self, rows: np.ndarray) -> "Truncation":
        """A copy, of these rows."""
        return Truncation(self.top_k[rows], self.top_p[rows], self.min_p[rows])

    def copy(self) -> "Truncation":
        return Truncation(self.top_k.copy(), self.top_p.copy(), self.min_p.copy())


_OFF = 0, 1.0, 0.0


def truncate(logprobs: Tensor, truncation: Truncation) -> Tensor:
    """bool [R, V]: what is left of normalised log-probs [R, V].

    Each works on what the one before it left: min-p keeps tokens of at least `min_p` times the largest probability;
    top-k the k most likely; top-p the fewest most likely that have `top_p` of the mass left. Tokens exactly as likely
    as the last one kept are kept too, so what is left does not depend on the order of the vocabulary. Tokens without
    probability are never left.
    """
    rows = np.arange(len(logprobs))
    mask = torch.empty_like(logprobs, dtype=torch.bool)
    candidates = max(_CANDIDATES, int(truncation.top_k.max(initial=0)))
    while len(rows):
        candidates = min(logprobs.shape[-1], candidates)
        where = torch.from_numpy(rows).to(logprobs.device)
        some = logprobs if len(rows) == len(logprobs) else logprobs[where]
        best = some.topk(candidates, dim=-1).values
        mask[where], more = _within(some, best, *truncation.take(rows))
        rows = rows[more.cpu().numpy()] if candidates < logprobs.shape[-1] else rows[:0]
        candidates *= _GROWTH
    return mask


def _within(
    logprobs: Tensor, best: Tensor, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Mask bool [R, V] by each row's `best` [R, C], descending; and rows bool [R] whose nucleus may go beyond them."""
    device, dtype = best.device, best.dtype
    with np.errstate(divide="ignore"):
        relative = torch.from_numpy(np.log(min_p)).to(device, dtype)
    limit = (best[:, 0] + relative).clamp_min(torch.finfo(dtype).min)
    k = torch.from_numpy(np.where(top_k > 0, np.minimum(top_k, best.shape[1]), 1)).to(device)
    kth = best.gather(1, k.unsqueeze(1) - 1).squeeze(1).clamp_min(torch.finfo(dtype).min)
    limit = torch.where(torch.from_numpy(top_k > 0).to(device), torch.maximum(limit, kth), limit)
    mask = logprobs >= limit.unsqueeze(1)
    nucleus = torch.from_numpy(top_p < 1).to(device)
    if not (top_p < 1).any():
        return mask, torch.zeros_like(nucleus)
    mass = torch.where(mask, logprobs, float("-inf")).exp().sum(-1, dtype=torch.float64)
    wanted = torch.from_numpy(top_p).to(device) * mass
    p = best.double().exp()
    # A token stays while those before it have less than the wanted mass; the first always does.
    stays = (p.cumsum(-1) - p < wanted.unsqueeze(1)) & (best >= limit.unsqueeze(1))
    stays[:, 0] = True
    last = best.gather(1, stays.sum(-1, keepdim=True) - 1).squeeze(1)
    limit = torch.where(nucleus, torch.maximum(limit, last), limit)
    return logprobs >= limit.unsqueeze(1), nucleus & stays[:, -1]
