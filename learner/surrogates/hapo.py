"""Clip bounds and advantages that depend on each token's entropy."""

from typing import Annotated

import torch
from msgspec import Meta

from learner.pieces import Piece
from learner.ratios import importance_ratio
from learner.segments import quantile
from learner.surrogates.gppo import check_dual_clip
from learner.tokens import MicroBatchTokens, Needs, TokenMetrics
from pipeline.config.types import NonNegativeFloat, Section, option

_SMALLEST_ENTROPY = 1e-8


class HAPO(Piece):
    """PPO's clipped loss with A (1 + beta h) and an asymmetric band: 1 - clip_low (1 - alpha h) where h <= 0,
    1 + clip_high (1 + alpha h) where h > 0; h in [-1, 1] is the token's standing among the log-entropies of the batch.

    HAPO, arXiv 2509.16591 (differential advantage and asymmetric clip). h = (log H - Q) / rms(log H - Q), Q the 0.8
    quantile, positive values divided by the largest and negative ones by the size of the smallest: the paper's
    description; its code divides negative values by their (negative) minimum, which makes them positive. The advantage
    changes for h > 0 only where r = pi / pi_old is outside (1 - clip_low / 2, 1 + clip_high / 2), for h <= 0 only
    inside. Statistics are over the whole mini-batch. HAPO's temperature of single tokens at sampling is not here: no
    engine samples with it. Its token-level group average is the advantage "token-group".
    """

    name = "hapo"
    needs = Needs.ENTROPY

    class Options(Section):
        clip_low: Annotated[Annotated[float, Meta(ge=0, le=1)], option("width of the band below 1 where h is 0")] = 0.2
        clip_high: Annotated[NonNegativeFloat, option("width of the band above 1 where h is 0")] = 0.2
        alpha: Annotated[NonNegativeFloat, option("how much the band depends on h")] = 1.0
        beta: Annotated[NonNegativeFloat, option("how much the advantage depends on h")] = 1.0
        dual_clip: Annotated[NonNegativeFloat, option("largest ratio where the advantage is negative; 0: none")] = 10.0

    def __init__(self, options: Options) -> None:
        check_dual_clip(self.name, options.clip_high * (1 + options.alpha), options.dual_clip)
        super().__init__(options)

    def plan(self, tokens: MicroBatchTokens) -> torch.Tensor:
        """float32 [M], h of each token."""
        entropy = tokens.entropy.double()
        if not len(entropy):
            return tokens.entropy
        log = entropy.clamp(min=_SMALLEST_ENTROPY).log()
        middle = quantile(log, 0.8)
        deviation = (log - middle).square().mean().sqrt().clamp(min=1e-12)
        standing = (log - middle) / deviation
        largest = ((log.max() - middle) / deviation).clamp(min=1e-12)
        smallest = ((middle - log.min()) / deviation).clamp(min=1e-12)
        return torch.where(standing > 0, standing / largest, standing / smallest).float()

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]; `clip_fraction` counts tokens whose gradient a bound removed."""
        o, h = self.options, tokens.planned
        ratio = importance_ratio(tokens.logp, tokens.logp_old)
        inside = (1 - o.clip_low / 2 < ratio) & (ratio < 1 + o.clip_high / 2)
        advantage = tokens.advantage * torch.where(inside == (h <= 0), 1 + o.beta * h, 1.0)
        low = 1 - torch.where(h <= 0, o.clip_low * (1 - o.alpha * h), o.clip_low)
        high = 1 + torch.where(h > 0, o.clip_high * (1 + o.alpha * h), o.clip_high)
        loss = torch.maximum(-advantage * ratio, -advantage * torch.clamp(ratio, low, high))
        removed = ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))
        if o.dual_clip:
            loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * o.dual_clip), loss)
            removed = removed | ((ratio > o.dual_clip) & (advantage < 0))
        return loss, {"clip_fraction": removed}
