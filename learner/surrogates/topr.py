"""Tapered off-policy REINFORCE."""

import torch

from learner.pieces import Piece
from learner.segments import sequence_sum
from learner.tokens import MicroBatchTokens, Needs, TokenMetrics


class TOPR(Piece):
    """L = -w A log pi, w = 1 where A >= 0, else sg(min(1, prod_t pi / mu)) over the sample.

    Le Roux et al. 2025, "TOPR", arXiv 2503.14286. Positive samples are learnt from however stale, negative ones fade as
    the policy leaves them. The ratio goes down to mu, so no further importance weight belongs here. Only the sign of
    the (baselined) reward chooses the branch; long negative samples fade first.
    """

    name = "topr"
    needs = Needs.BEHAVIOUR_LOGPROBS
    weighs = True
    sequence_ratio = True

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]; `taper` is the weight, 1 for positive samples."""
        log = sequence_sum((tokens.logp - tokens.logp_behaviour).detach(), tokens.sequence)
        weight = torch.where(tokens.advantage >= 0, torch.ones_like(log), log.clamp(max=0).exp())
        return -weight * tokens.advantage * tokens.logp, {"taper": weight}
