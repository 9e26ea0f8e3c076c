"""Tokens that would move the entropy most weigh less."""

import math
from typing import Annotated, Literal

import torch
from msgspec import Meta

from learner.pieces import Piece
from learner.ratios import LOG_RATIO_BOUND
from learner.tokens import MicroBatchTokens, Needs, TokenMetrics
from pipeline.config.types import PositiveFloat, Section, option

_TINY = 1e-8


class STEER(Piece):
    """L_t <- lambda_t L_t, lambda_t falling with Omega_t = |A_t / pi_old p (1 - p)(log p + H)|, p = pi(y_t), the size
    of the token's effect on the entropy.

    STEER, arXiv 2510.10150. "linear": from `high` at the smallest Omega to `low` at the largest. "exponential":
    clip(exp(-k Omega), low, 1) with k = -ln(low) / max(max Omega, 0.02). Extremes are over the whole mini-batch; 1 /
    pi_old is bounded by e^20.
    """

    name = "steer"
    needs = Needs.ENTROPY

    class Options(Section):
        shape: Annotated[Literal["linear", "exponential"], option("how the weight falls")] = "linear"
        low: Annotated[Annotated[float, Meta(gt=0, le=1)], option("smallest weight")] = 0.8
        high: Annotated[PositiveFloat, option("largest weight (linear)")] = 1.2

    def plan(self, tokens: MicroBatchTokens) -> torch.Tensor:
        """float32 [M], lambda."""
        effect = entropy_effect(tokens)
        if not len(effect):
            return effect.float()
        smallest, largest = effect.min(), effect.max()
        if self.options.shape == "linear":
            position = (effect - smallest) / (largest - smallest).clamp(min=1e-30)
            return (self.options.high - position * (self.options.high - self.options.low)).float()
        rate = -math.log(self.options.low) / largest.clamp(min=0.02)
        return (-rate * effect).exp().clamp(self.options.low, 1.0).float()

    def __call__(self, loss: torch.Tensor, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]"""
        return loss * tokens.planned, {"weight": tokens.planned}


def entropy_effect(tokens: MicroBatchTokens) -> torch.Tensor:
    """Omega of each token, float64 [T]."""
    p = tokens.logp.double().exp().clamp(_TINY, 1 - _TINY)
    inverse_old = (-tokens.logp_old.double()).clamp(max=LOG_RATIO_BOUND).exp()
    return (tokens.advantage.double() * inverse_old * p * (1 - p) * (p.log() + tokens.entropy.double())).abs()
