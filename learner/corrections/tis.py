"""Truncated importance sampling, token level."""

from typing import Annotated

import torch

from learner.objective import BatchTokens, Needs
from learner.ratios import effective_sample_fraction, finite_or_zero, importance_ratio
from pipeline.config.types import PositiveFloat, Section, option


class TruncatedImportanceSampling:
    """W_t = min(rho_t, cap) with rho_t = pi_old(y_t) / mu(y_t), detached.

    Truncation: Ionides 2008, "Truncated importance sampling", eq. 4. As the behaviour weight of a decoupled PPO loss:
    Fu et al. 2025, "AReaL", arXiv 2505.24298; cap 2 is the usual value for language models. Token weights correct the
    choice of each token given its prefix; how often mu visits the prefix stays uncorrected.
    """

    name = "tis"
    needs = Needs.BEHAVIOUR_LOGPROBS

    class Options(Section):
        cap: Annotated[PositiveFloat, option("largest weight of a token")] = 2.0

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, batch: BatchTokens) -> tuple[torch.Tensor, dict[str, float]]:
        """float32 [N]"""
        ratio = finite_or_zero(importance_ratio(batch.logp_old, batch.logp_behaviour)).detach()
        weight = ratio.clamp(max=self.options.cap)
        if not ratio.numel():
            return weight, {}
        return weight, {
            "capped_fraction": float((ratio > self.options.cap).float().mean()),
            "ratio_max": float(ratio.max()),
            "ratio_ess": effective_sample_fraction(ratio),
        }
