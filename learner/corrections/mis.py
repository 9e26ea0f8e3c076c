"""Masked importance sampling, sequence level."""

from typing import Annotated, Literal

import torch

from learner.pieces import Piece
from learner.ratios import LOG_RATIO_BOUND, finite_or_zero, log_ratio
from learner.segments import sequence_sum
from learner.tokens import BatchMetrics, BatchTokens, Needs
from pipeline.config.types import NonNegativeFloat, PositiveFloat, Section, option
from pipeline.errors import UsageError


class MaskedImportanceSampling(Piece):
    """W = rho_y where low <= rho_y <= high, else 0, with rho_y = prod_t pi_old(y_t) / mu(y_t) over the sample.

    "seq-MIS" of the rollout corrections that verl, SkyRL and TRL document; TRL's default is a cap of 3 without a lower
    bound. With weight = "token" the samples inside the band are weighted by their tokens' own ratios. The product's
    spread grows with length, so long samples are dropped more often; the geometric mask does not have that bias.
    """

    name = "mis"
    needs = Needs.BEHAVIOUR_LOGPROBS
    weighs = True

    class Options(Section):
        low: Annotated[NonNegativeFloat, option("smallest product that is kept")] = 0.0
        high: Annotated[PositiveFloat, option("largest product that is kept")] = 3.0
        weight: Annotated[Literal["sequence", "token"], option("weight inside the band: product or own ratio")] = (
            "sequence"
        )

    def __init__(self, options: Options) -> None:
        if not options.low <= 1 <= options.high:
            raise UsageError(
                f"mis: the band [{options.low}, {options.high}] must hold 1, the weight of samples of pi_old"
            )
        super().__init__(options)

    def __call__(self, weight: torch.Tensor, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """float32 [N]"""
        log = log_ratio(batch.logp_old, batch.logp_behaviour).detach()
        product = sequence_sum(log, batch.sequence).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
        kept = (self.options.low <= product) & (product <= self.options.high)
        ratio = product if self.options.weight == "sequence" else log.exp()
        weight = weight * torch.where(kept, finite_or_zero(ratio), torch.zeros_like(ratio))
        return weight, {"tokens_kept": float(kept.float().mean())} if kept.numel() else {}
