"""Sequence-level importance ratios."""

from typing import Annotated

import torch
from msgspec import Meta

from learner.pieces import Piece
from learner.ratios import log_ratio, unit_ratio
from learner.segments import sequence_mean
from learner.surrogates.gppo import check_dual_clip
from learner.tokens import MicroBatchTokens, TokenMetrics
from pipeline.config.types import NonNegativeFloat, Section, option

_LOG_BOUND = 10.0


class GSPO(Piece):
    """L_t = max(-A s_t, -A clip(s_t, 1 - clip_low, 1 + clip_high)) with s_t = sg(s) pi / sg(pi) and
    s = exp(mean over the sample of log(pi / pi_old)), the geometric mean of its token ratios.

    Zheng et al. 2025, "GSPO", arXiv 2507.18071, eqs. 5 and 7, in the token form (GSPO-token, eq. 13), which has the
    same value and gradient where the sample's tokens share their advantage. Defined as a mean over samples of means
    over tokens. Clip fractions of a tenth or more are normal. log s is bounded by 10 from above; dual clip as in
    ppo-clip.
    """

    name = "gspo"
    sequence_ratio = True
    aggregations = ("sequence-mean",)

    class Options(Section):
        clip_low: Annotated[Annotated[float, Meta(ge=0, le=1)], option("ratio is clipped below 1 minus this")] = 3e-4
        clip_high: Annotated[NonNegativeFloat, option("ratio is clipped above 1 plus this")] = 4e-4
        dual_clip: Annotated[NonNegativeFloat, option("largest ratio where the advantage is negative; 0: none")] = 10.0

    def __init__(self, options: Options) -> None:
        check_dual_clip(self.name, options.clip_high, options.dual_clip)
        super().__init__(options)

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]; `clip_fraction` counts tokens whose gradient a bound removed."""
        advantage, dual_clip = tokens.advantage, self.options.dual_clip
        low, high = 1 - self.options.clip_low, 1 + self.options.clip_high
        mean = sequence_mean(log_ratio(tokens.logp, tokens.logp_old).detach(), tokens.sequence)
        value = mean.clamp(max=_LOG_BOUND).exp()
        ratio = value * unit_ratio(tokens.logp)
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))
        below, above = (value < low) & (advantage < 0), (value > high) & (advantage > 0)
        dual = torch.zeros_like(below)
        if dual_clip:
            loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * dual_clip), loss)
            dual = (value > dual_clip) & (advantage < 0)
        return loss, {"clip_fraction": below | above | dual, "low": below, "high": above}
