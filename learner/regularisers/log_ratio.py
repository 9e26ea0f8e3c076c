"""A spring between the policy and the one that sampled."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.ratios import log_ratio
from learner.tokens import MicroBatchTokens, TokenMetrics
from pipeline.config.types import NonNegativeFloat, Section, option


class SquaredLogRatio(Piece):
    """Adds coefficient * (log pi - log pi_old)^2 for every token, those that the surrogate masks included.

    Kimi k1.5, arXiv 2501.12599, eq. 3, per token as in prime-rl (`objective.proximal = "behaviour"` puts mu in place of
    pi_old), whose value is 1e-3.
    """

    name = "log-ratio"

    class Options(Section):
        coefficient: Annotated[NonNegativeFloat, option("weight of the squared log-ratio")] = 1e-3

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]"""
        square = log_ratio(tokens.logp, tokens.logp_old).square()
        return self.options.coefficient * square, {"square": square.detach()}
