"""Only the tokens of high entropy are trained."""

from typing import Annotated

import torch
from msgspec import Meta

from learner.pieces import Piece
from learner.segments import quantile
from learner.tokens import MicroBatchTokens, Needs, TokenMetrics
from pipeline.config.types import Section, option


class HighEntropyTokens(Piece):
    """Loss 0 where H_t is below the (1 - fraction) quantile of the entropies of the mini-batch.

    Wang et al. 2025, "Beyond the 80/20 rule", arXiv 2506.01939, eq. 5. The quantile is over all tokens of the whole
    mini-batch under the policy now. The tokens left out stay in the denominator (as in TRL), so the gradient is about
    the share `fraction` of what a mean over kept tokens would give.
    """

    name = "high-entropy"
    needs = Needs.ENTROPY

    class Options(Section):
        fraction: Annotated[Annotated[float, Meta(gt=0, le=1)], option("share of tokens that is trained")] = 0.2

    def plan(self, tokens: MicroBatchTokens) -> torch.Tensor:
        """bool [M], tokens that are kept."""
        if not len(tokens.entropy):
            return torch.ones_like(tokens.entropy, dtype=torch.bool)
        return tokens.entropy >= quantile(tokens.entropy, 1 - self.options.fraction)

    def __call__(self, loss: torch.Tensor, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]"""
        return torch.where(tokens.planned, loss, torch.zeros_like(loss)), {"kept": tokens.planned}
