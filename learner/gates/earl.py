"""Only each answer's tokens of high entropy are trained."""

from typing import Annotated

import torch
from msgspec import Meta

from learner.pieces import Piece
from learner.segments import sequence_quantile
from learner.tokens import MicroBatchTokens, Needs, TokenMetrics
from pipeline.config.types import Section, option


class EARL(Piece):
    """Loss 0 where H_t is below a quantile of the entropies of its own sample.

    EARL, arXiv 2511.12033, on DAPO's surrogate with a KL term. Reconstructed: the paper's quantile is not known to us,
    0.8 is ours. The tokens left out stay in the denominator.
    """

    name = "earl"
    needs = Needs.ENTROPY
    reconstructed = True

    class Options(Section):
        quantile: Annotated[Annotated[float, Meta(ge=0, lt=1)], option("tokens from this quantile on are trained")] = (
            0.8
        )

    def __call__(self, loss: torch.Tensor, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]"""
        entropy = tokens.entropy.detach()
        kept = entropy >= sequence_quantile(entropy, tokens.sequence, self.options.quantile)
        return torch.where(kept, loss, torch.zeros_like(loss)), {"kept": kept}
