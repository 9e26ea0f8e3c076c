"""The plain policy gradient."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.ratios import importance_ratio
from learner.tokens import MicroBatchTokens, TokenMetrics
from pipeline.config.types import NonNegativeFloat, Section, option


class Reinforce(Piece):
    """L = -A log pi, or with a cap -sg(min(r, cap)) A log pi, r = pi / pi_old.

    Williams 1992, REINFORCE. With `objective.proximal = "behaviour"` and a cap it is the one-sided truncated weight of
    LlamaRL's AIPO (arXiv 2505.24034) and of V-trace without a critic (arXiv 1802.01561, eq. 1).
    """

    name = "reinforce"

    class Options(Section):
        cap: Annotated[NonNegativeFloat, option("largest weight pi / pi_old; 0: no weight at all")] = 0.0

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]; `clip_fraction` counts tokens whose weight was capped."""
        loss = -tokens.advantage * tokens.logp
        if not self.options.cap:
            return loss, {}
        ratio = importance_ratio(tokens.logp, tokens.logp_old).detach()
        return loss * ratio.clamp(max=self.options.cap), {"clip_fraction": ratio > self.options.cap}
