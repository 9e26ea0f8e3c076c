"""Samples whose total mismatch is too large are dropped."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.ratios import LOG_RATIO_BOUND, log_ratio
from learner.segments import sequence_sum
from learner.tokens import BatchMetrics, BatchTokens, Needs
from pipeline.config.types import NonNegativeFloat, PositiveFloat, Section, option
from pipeline.errors import UsageError


class ProductMask(Piece):
    """Weight 0 for the tokens of samples whose product of rho_t = pi_old / mu is outside [low, high].

    Sequence rejection of verl (seq_sum_k1) and SkyRL (0.5 to 2). A pure mask. The product's spread grows with length,
    so long samples are dropped more often.
    """

    name = "product-mask"
    needs = Needs.BEHAVIOUR_LOGPROBS

    class Options(Section):
        low: Annotated[NonNegativeFloat, option("smallest product that is kept")] = 0.5
        high: Annotated[PositiveFloat, option("largest product that is kept")] = 2.0

    def __init__(self, options: Options) -> None:
        if not options.low <= 1 <= options.high:
            raise UsageError(f"product-mask: the band [{options.low}, {options.high}] must hold 1")
        super().__init__(options)

    def __call__(self, weight: torch.Tensor, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """float32 [N]"""
        total = sequence_sum(log_ratio(batch.logp_old, batch.logp_behaviour).detach(), batch.sequence)
        product = total.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
        kept = (self.options.low <= product) & (product <= self.options.high)
        weight = torch.where(kept, weight, torch.zeros_like(weight))
        return weight, {"tokens_kept": float(kept.float().mean())} if kept.numel() else {}
