"""Gradient-preserving clipping with a coefficient for each side."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.surrogates.gppo import ClipLow, bounded_gradient, check_dual_clip
from learner.tokens import MicroBatchTokens, TokenMetrics
from pipeline.config.types import NonNegativeFloat, Section, option


class CEGPPO(Piece):
    """L = -A r, except -beta_low A (1 - clip_low) r / sg(r) where r < 1 - clip_low and A < 0, and
    -beta_high A (1 + clip_high) r / sg(r) where r > 1 + clip_high and A > 0.

    CE-GPPO, arXiv 2509.20712. A larger beta_low pushes unlikely tokens of wrong answers down further, which costs
    entropy; a larger beta_high strengthens unlikely tokens of right answers, which keeps it. Both 1 is GPPO, both 0 is
    PPO's clip. The betas scale the value too, so losses are not comparable with PPO's.
    """

    name = "ce-gppo"

    class Options(Section):
        clip_low: Annotated[ClipLow, option("gradient is bounded where the ratio is below 1 minus this")] = 0.2
        clip_high: Annotated[NonNegativeFloat, option("gradient is bounded where the ratio is above 1 plus this")] = 0.2
        beta_low: Annotated[NonNegativeFloat, option("scale below the band, negative advantages")] = 0.75
        beta_high: Annotated[NonNegativeFloat, option("scale above the band, positive advantages")] = 1.0
        dual_clip: Annotated[NonNegativeFloat, option("largest ratio where the advantage is negative; 0: none")] = 10.0

    def __init__(self, options: Options) -> None:
        check_dual_clip(self.name, options.clip_high, options.dual_clip)
        super().__init__(options)

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]; `clip_fraction` counts tokens whose ratio was bounded."""
        options = self.options
        return bounded_gradient(
            tokens, options.clip_low, options.clip_high, options.dual_clip, options.beta_low, options.beta_high
        )
