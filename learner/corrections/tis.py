"""Truncated importance sampling."""

from typing import Annotated, Literal

import torch

from learner.pieces import Piece
from learner.ratios import LOG_RATIO_BOUND, effective_sample_fraction, finite_or_zero, log_ratio
from learner.segments import sequence_sum
from learner.tokens import BatchMetrics, BatchTokens, Needs
from pipeline.config.types import NonNegativeFloat, PositiveFloat, Section, option
from pipeline.errors import UsageError


class TruncatedImportanceSampling(Piece):
    """W_t = clip(rho_t, floor, cap) with rho_t = pi_old(y_t) / mu(y_t), detached; at level "sequence" rho is the
    product over the sample's tokens, the same for all of them.

    Truncation: Ionides 2008, "Truncated importance sampling", eq. 4. As the behaviour weight of a decoupled PPO loss:
    Fu et al. 2025, "AReaL", arXiv 2505.24298; cap 2 is the usual value for tokens of language models, 2 to 10 for
    sequences. Token weights correct the choice of each token given its prefix; how often mu visits the prefix stays
    uncorrected. Sequence weights correct both, with a variance that grows exponentially with length.
    """

    name = "tis"
    needs = Needs.BEHAVIOUR_LOGPROBS
    weighs = True

    class Options(Section):
        cap: Annotated[PositiveFloat, option("largest weight")] = 2.0
        floor: Annotated[NonNegativeFloat, option("smallest weight")] = 0.0
        level: Annotated[Literal["token", "sequence"], option("ratio of a token, or product over a sample")] = "token"

    def __init__(self, options: Options) -> None:
        if options.floor > min(options.cap, 1.0):
            raise UsageError(f"tis: floor = {options.floor} must not be above 1 or above cap = {options.cap}")
        super().__init__(options)

    def __call__(self, weight: torch.Tensor, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """float32 [N]"""
        log = log_ratio(batch.logp_old, batch.logp_behaviour).detach()
        if self.options.level == "sequence":
            log = sequence_sum(log, batch.sequence).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        ratio = log.exp()
        # Not a number stays so through the clamp, and is 0 only then: a floor must not give it a weight.
        weight = weight * finite_or_zero(ratio.clamp(self.options.floor, self.options.cap))
        ratio = finite_or_zero(ratio)
        if not ratio.numel():
            return weight, {}
        return weight, {
            "capped_fraction": float((ratio > self.options.cap).float().mean()),
            "ratio_max": float(ratio.max()),
            "ratio_ess": effective_sample_fraction(ratio),
        }
