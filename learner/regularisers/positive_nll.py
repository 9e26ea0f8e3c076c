"""Likelihood of right answers."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.tokens import MicroBatchTokens, TokenMetrics
from pipeline.config.types import NonNegativeFloat, Section, option


class PositiveNLL(Piece):
    """Adds coefficient * mean of -log pi over the tokens of samples whose reward is above `threshold`.

    "Klear-Reasoner" (GPPO), arXiv 2508.07629, with 0.1; the same in ERC's and CE-GPPO's recipes, after VAPO
    (arXiv 2504.05118). The mean is over those tokens of the whole mini-batch, whatever the objective's aggregation.
    """

    name = "positive-nll"
    plans_from_policy = False

    class Options(Section):
        coefficient: Annotated[NonNegativeFloat, option("weight of the likelihood term")] = 0.1
        threshold: Annotated[float, option("rewards above this count as right")] = 0.0

    def plan(self, tokens: MicroBatchTokens) -> torch.Tensor:
        """float32 [M], 1 / number of right answers' tokens where the token is one of them, else 0."""
        right = (tokens.reward > self.options.threshold).float()
        return right / right.sum().clamp(min=1)

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]"""
        share = tokens.planned
        # The aggregation multiplies by its coefficient; what is left is the mean over right answers.
        nll = torch.where(share > 0, -tokens.logp, torch.zeros_like(share))
        return self.options.coefficient * share * nll / tokens.coefficient, {"right": share > 0}
