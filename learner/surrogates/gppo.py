"""Gradient-preserving clipping."""

from typing import Annotated

import torch
from msgspec import Meta

from learner.pieces import Piece
from learner.ratios import importance_ratio, unit_ratio
from learner.tokens import MicroBatchTokens, TokenMetrics
from pipeline.config.types import NonNegativeFloat, Section, option
from pipeline.errors import UsageError

ClipLow = Annotated[float, Meta(ge=0, le=1)]
"""1 takes the lower bound to 0, which no ratio is below"""


class GPPO(Piece):
    """L = -A r, except -A (1 - clip_low) r / sg(r) where r < 1 - clip_low and A < 0, and -A (1 + clip_high) r / sg(r)
    where r > 1 + clip_high and A > 0: where PPO's clip would remove the gradient it is bounded instead.

    "Klear-Reasoner", arXiv 2508.07629, eqs. 11 and 12; r = pi / pi_old. In the two pessimistic quadrants the gradient
    stays r, in which it differs from CISPO. Dual clip as in ppo-clip.
    """

    name = "gppo"

    class Options(Section):
        clip_low: Annotated[ClipLow, option("gradient is bounded where the ratio is below 1 minus this")] = 0.2
        clip_high: Annotated[NonNegativeFloat, option("gradient is bounded where the ratio is above 1 plus this")] = (
            0.28
        )
        dual_clip: Annotated[NonNegativeFloat, option("largest ratio where the advantage is negative; 0: none")] = 10.0

    def __init__(self, options: Options) -> None:
        check_dual_clip(self.name, options.clip_high, options.dual_clip)
        super().__init__(options)

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]; `clip_fraction` counts tokens whose ratio was bounded."""
        options = self.options
        return bounded_gradient(tokens, options.clip_low, options.clip_high, options.dual_clip, 1.0, 1.0)


def bounded_gradient(
    tokens: MicroBatchTokens, clip_low: float, clip_high: float, dual_clip: float, beta_low: float, beta_high: float
) -> tuple[torch.Tensor, TokenMetrics]:
    """The general form of GPPO and CE-GPPO: the two clipped branches are multiplied by `beta_low` and `beta_high`."""
    advantage = tokens.advantage
    ratio = importance_ratio(tokens.logp, tokens.logp_old)
    unit = unit_ratio(tokens.logp)
    below = (ratio < 1 - clip_low) & (advantage < 0)
    above = (ratio > 1 + clip_high) & (advantage > 0)
    loss = -advantage * ratio
    loss = torch.where(below, -advantage * beta_low * (1 - clip_low) * unit, loss)
    loss = torch.where(above, -advantage * beta_high * (1 + clip_high) * unit, loss)
    dual = torch.zeros_like(below)
    if dual_clip:
        dual = (advantage < 0) & (loss.detach() > -advantage * dual_clip)
        loss = torch.where(dual, -advantage * dual_clip, loss)
    return loss, {"clip_fraction": below | above | dual, "low": below, "high": above, "dual": dual}


def check_dual_clip(name: str, clip_high: float, dual_clip: float) -> None:
    """Raises UsageError for a dual clip inside the band."""
    if 0 < dual_clip <= 1 + clip_high:
        raise UsageError(f"{name}: dual_clip {dual_clip} must be above 1 + clip_high = {1 + clip_high}, or 0")
