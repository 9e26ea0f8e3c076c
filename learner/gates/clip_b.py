"""Negative samples' tokens that raise entropy too fast are left out, by the batch's standing."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.tokens import MicroBatchTokens, Needs, TokenMetrics
from pipeline.config.types import NonNegativeFloat, Section, option


class ClipB(Piece):
    """Loss 0 where A < 0 and S_t - mean S < -mu std S, S_t = p_t (log p_t + H_t), p_t = pi(y_t).

    "On the entropy dynamics in reinforcement fine-tuning", arXiv 2602.03392 (Clip_B). S is the entropy discriminator:
    learning from a token changes the entropy by about -(S_t - E_pi[S]) times the step. Mean and population deviation
    are over the whole mini-batch; the left-out tokens stay in the denominator.
    """

    name = "clip-b"
    needs = Needs.ENTROPY

    class Options(Section):
        mu: Annotated[NonNegativeFloat, option("standard deviations below the mean from which tokens are left out")] = (
            2.5
        )

    def plan(self, tokens: MicroBatchTokens) -> torch.Tensor:
        """bool [M], tokens that are kept."""
        score = discriminator(tokens)
        if not len(score):
            return torch.ones_like(score, dtype=torch.bool)
        standing = score - score.mean()
        return (tokens.advantage >= 0) | (standing >= -self.options.mu * score.std(correction=0))

    def __call__(self, loss: torch.Tensor, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]"""
        return torch.where(tokens.planned, loss, torch.zeros_like(loss)), {"left_out": ~tokens.planned}


def discriminator(tokens: MicroBatchTokens) -> torch.Tensor:
    """S of each token, float64 [T]."""
    logp = tokens.logp.double()
    return logp.exp() * (logp + tokens.entropy.double())
