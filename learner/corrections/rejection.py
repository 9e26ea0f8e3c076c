"""Rejection by a divergence estimate of a token or a sample."""

from typing import Annotated, Literal

import torch

from learner.pieces import Piece
from learner.ratios import k3, log_ratio
from learner.segments import sequence_mean, sequence_sum
from learner.tokens import BatchMetrics, BatchTokens, Needs
from pipeline.config.types import PositiveFloat, Section, option


class DivergenceRejection(Piece):
    """Weight 0 where an estimate d of KL(mu || pi_old) is above `high`: k2 = (log rho)^2 / 2 or k3 = rho - 1 - log rho,
    of a token, or as sum, mean or maximum over the sample.

    The k2 and k3 rejections of verl's rollout correction (Schulman 2020 for the estimators); a mean k3 of 0.001 to 0.01
    is usual. For bands on the ratio itself (k1) see token-mask, product-mask and geometric-mask. A pure mask.
    """

    name = "rejection"
    needs = Needs.BEHAVIOUR_LOGPROBS

    class Options(Section):
        estimator: Annotated[Literal["k2", "k3"], option("divergence estimate")] = "k3"
        level: Annotated[
            Literal["token", "sequence-sum", "sequence-mean", "sequence-max"], option("what the bound is on")
        ] = "sequence-mean"
        high: Annotated[PositiveFloat, option("largest divergence that is kept, nats")] = 0.01

    def __call__(self, weight: torch.Tensor, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """float32 [N]"""
        if self.options.estimator == "k2":
            divergence = log_ratio(batch.logp_old, batch.logp_behaviour).square() / 2
        else:
            divergence = k3(batch.logp_old, batch.logp_behaviour)
        kept = self._over_sample(divergence.detach(), batch.sequence) <= self.options.high
        weight = torch.where(kept, weight, torch.zeros_like(weight))
        return weight, {"tokens_kept": float(kept.float().mean())} if kept.numel() else {}

    def _over_sample(self, divergence: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
        match self.options.level:
            case "sequence-sum":
                return sequence_sum(divergence, sequence)
            case "sequence-mean":
                return sequence_mean(divergence, sequence)
            case "sequence-max":
                ids, inverse = sequence.unique(return_inverse=True)
                return divergence.new_zeros(len(ids)).scatter_reduce(0, inverse, divergence, "amax")[inverse]
        return divergence
