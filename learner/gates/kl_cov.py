"""Tokens of the highest covariance are held to where they were."""

from typing import Annotated

import torch
from msgspec import Meta

from learner.gates.covariance import covariance
from learner.pieces import Piece
from learner.ratios import log_ratio
from learner.tokens import MicroBatchTokens, TokenMetrics
from pipeline.config.types import NonNegativeFloat, Section, option


class KLCov(Piece):
    """Adds coefficient * |log pi - log pi_old| to the loss of the tokens with the largest cov_t = (A_t - mean A)
    (log pi_t - mean log pi).

    Cui et al. 2025, "The entropy mechanism of RL", arXiv 2505.22617 (KL-Cov), on the surrogate without a clip
    ("unclipped"). `fraction` is a plain share of the N tokens, exactly max(1, int(fraction N)) of them: 2e-3 for 7B,
    2e-4 for 32B; equal covariances are chosen among at random, and where all are 0 no token is held. Means and order
    are over the whole mini-batch.
    """

    name = "kl-cov"

    class Options(Section):
        coefficient: Annotated[NonNegativeFloat, option("weight of |log pi - log pi_old|")] = 1.0
        fraction: Annotated[Annotated[float, Meta(gt=0, le=1)], option("share of all tokens that is held")] = 2e-3

    def plan(self, tokens: MicroBatchTokens) -> torch.Tensor:
        """bool [M], tokens that are held."""
        cov = covariance(tokens)
        held = torch.zeros_like(cov, dtype=torch.bool)
        if not len(cov) or not bool(cov.any()):
            return held
        wanted = max(1, int(self.options.fraction * len(cov)))
        # Ties by the token's own random number: the same tokens in any order of the mini-batch.
        order = tokens.uniform.argsort(stable=True)
        return held.index_fill(0, order[cov[order].argsort(descending=True, stable=True)][:wanted], True)

    def __call__(self, loss: torch.Tensor, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]"""
        distance = log_ratio(tokens.logp, tokens.logp_old).abs()
        held = torch.where(tokens.planned, self.options.coefficient * distance, torch.zeros_like(loss))
        return loss + held, {"held": tokens.planned, "loss": held.detach()}
