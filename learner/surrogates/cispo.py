"""Clipped importance weights on the policy gradient."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.ratios import importance_ratio
from learner.tokens import MicroBatchTokens, TokenMetrics
from pipeline.config.types import NonNegativeFloat, PositiveFloat, Section, option
from pipeline.errors import UsageError


class CISPO(Piece):
    """L = -sg(clip(r, floor, cap)) A log pi, r = pi / pi_old: every token keeps a gradient, of bounded weight.

    "MiniMax-M1", arXiv 2506.13585, eqs. 4 and 5, without a lower bound as there. `cap` is the bound itself, not its
    distance to 1; 5 is the value of the ScaleRL recipe. The value of the loss means nothing, only its gradient does.
    """

    name = "cispo"

    class Options(Section):
        floor: Annotated[NonNegativeFloat, option("smallest weight; 0: none")] = 0.0
        cap: Annotated[PositiveFloat, option("largest weight")] = 5.0

    def __init__(self, options: Options) -> None:
        if not options.floor <= 1 <= options.cap:
            raise UsageError(f"cispo: floor {options.floor} to cap {options.cap} must hold 1, the ratio without change")
        super().__init__(options)

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]; `clip_fraction` counts tokens whose weight was clipped."""
        ratio = importance_ratio(tokens.logp, tokens.logp_old).detach()
        weight = ratio.clamp(self.options.floor, self.options.cap)
        return -weight * tokens.advantage * tokens.logp, {
            "clip_fraction": weight != ratio,
            "high": ratio > self.options.cap,
        }
