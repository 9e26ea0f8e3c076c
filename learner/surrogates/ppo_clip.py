"""The clipped surrogate of PPO, with clip-higher and dual clip."""

from typing import Annotated

import torch
from msgspec import Meta

from learner.pieces import Piece
from learner.ratios import importance_ratio
from learner.tokens import MicroBatchTokens, TokenMetrics
from pipeline.config.types import NonNegativeFloat, Section, option
from pipeline.errors import UsageError


class PPOClip(Piece):
    """L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), r = pi / pi_old; then, where A < 0, min(L, -A c).

    Schulman et al. 2017, arXiv 1707.06347, eq. 7. The wider upper bound is DAPO's clip-higher (arXiv 2503.14476,
    eq. 10); the bound c on what a negative advantage may cost is dual clip (Ye et al. 2020, arXiv 1912.09729, eq. 4).
    """

    name = "ppo-clip"

    class Options(Section):
        clip_low: Annotated[Annotated[float, Meta(ge=0, le=1)], option("ratio is clipped below 1 minus this")] = 0.2
        clip_high: Annotated[NonNegativeFloat, option("ratio is clipped above 1 plus this")] = 0.28
        dual_clip: Annotated[NonNegativeFloat, option("largest ratio where the advantage is negative; 0: none")] = 10.0

    def __init__(self, options: Options) -> None:
        if 0 < options.dual_clip <= 1 + options.clip_high:
            raise UsageError(
                f"ppo-clip: dual_clip {options.dual_clip} must be above 1 + clip_high = {1 + options.clip_high}, or 0"
            )
        super().__init__(options)

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]; `clip_fraction` counts tokens whose gradient a bound removed."""
        advantage, dual_clip = tokens.advantage, self.options.dual_clip
        low, high = 1 - self.options.clip_low, 1 + self.options.clip_high
        ratio = importance_ratio(tokens.logp, tokens.logp_old)
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))

        clipped_low = (ratio < low) & (advantage < 0)
        clipped_high = (ratio > high) & (advantage > 0)
        clipped_dual = torch.zeros_like(clipped_low)
        if dual_clip:
            loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * dual_clip), loss)
            clipped_dual = (ratio > dual_clip) & (advantage < 0)
        return loss, {
            "clip_fraction": clipped_low | clipped_high | clipped_dual,
            "low": clipped_low,
            "high": clipped_high,
            "dual": clipped_dual,
            "kl": (tokens.logp_old - tokens.logp).detach(),
        }
