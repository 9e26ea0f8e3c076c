"""Geometric mean of clipped token ratios."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.ratios import log_ratio, unit_ratio
from learner.segments import sequence_mean
from learner.tokens import MicroBatchTokens, TokenMetrics
from pipeline.config.types import NonNegativeFloat, Section, option


class GMPO(Piece):
    """L_i = -A exp(mean over the sample of u_t), u_t = sgn(A) min(sgn(A) log r_t, sgn(A) clip(log r_t, -low, high)).

    GMPO, arXiv 2507.20673; r = pi / pi_old, the clip is in log space. Written per token as
    -A sg(exp(mean u)) exp(u_t - sg(u_t)), whose mean over the sample has the same value and gradient, so that gates can
    act on single tokens. Defined as a mean over samples of means over tokens.
    """

    name = "gmpo"
    sequence_ratio = True
    aggregations = ("sequence-mean",)

    class Options(Section):
        clip_low: Annotated[NonNegativeFloat, option("log-ratio is clipped below minus this")] = 0.4
        clip_high: Annotated[NonNegativeFloat, option("log-ratio is clipped above this")] = 0.4

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]; `clip_fraction` counts tokens whose gradient the clip removed."""
        log = log_ratio(tokens.logp, tokens.logp_old)
        clipped = log.clamp(-self.options.clip_low, self.options.clip_high)
        positive = tokens.advantage > 0
        u = torch.where(positive, torch.minimum(log, clipped), torch.maximum(log, clipped))
        mean = sequence_mean(u.detach(), tokens.sequence).exp()
        removed = torch.where(positive, log > self.options.clip_high, log < -self.options.clip_low)
        return -tokens.advantage * mean * unit_ratio(u), {"clip_fraction": removed}
