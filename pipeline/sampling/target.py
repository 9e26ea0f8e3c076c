"""What the target samples from at the scored positions, and what is recorded of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.sampling.distribution import entropy, log_probabilities


@dataclass(frozen=True, slots=True)
class Kept:
    """What truncation left at R of the N positions."""

    positions: Tensor
    """int64 [R], ascending"""
    mask: Tensor
    """bool [R, V]"""

    def of(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Counts int64 [M] at the M positions that `chosen` bool [N] marks, 0 where nothing was truncated, and their
        ids int64 [sum], ascending."""
        mask = self.mask[chosen[self.positions]]
        counts = torch.zeros(len(chosen), dtype=torch.int64, device=mask.device)
        counts[self.positions] = self.mask.sum(-1)
        return counts[chosen], mask.nonzero()[:, 1]


@dataclass(frozen=True, slots=True)
class Target:
    """The target's distributions at N scored positions."""

    probabilities: Tensor
    """[N, V], what is sampled; one-hot for greedy rows"""
    logprobs: Tensor
    """[N, V], nats, of the same distribution; for greedy rows at temperature 1, before truncation"""
    entropies: Tensor | None
    """[N], nats, full vocabulary, at the sampling temperature (1 for greedy rows) before truncation"""
    kept: Kept | None = None
    """None where nothing is truncated"""


def plain_target(logits: Tensor, temperatures: Tensor, with_entropy: bool = True) -> Target:
    """The target of logits [N, V] at temperatures [N] (0: greedy), without any other setting."""
    logprobs = log_probabilities(logits, temperatures)
    probabilities = logprobs.exp()
    entropies = entropy(probabilities, logprobs) if with_entropy else None
    greedy = (temperatures == 0).nonzero().squeeze(1)
    return Target(make_greedy(probabilities, logits, greedy), logprobs, entropies)


def make_greedy(probabilities: Tensor, logits: Tensor, positions: Tensor) -> Tensor:
    """Overwrites the probabilities at `positions` int64 [G] by a one-hot distribution at the largest logit."""
    if len(positions):
        # Not at the largest probability: two logits may share one after rounding.
        best = logits[positions].argmax(-1)
        probabilities[positions] = torch.nn.functional.one_hot(best, logits.shape[-1]).to(probabilities.dtype)
    return probabilities
