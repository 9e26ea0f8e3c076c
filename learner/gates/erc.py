"""Entropy ratio clipping."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.tokens import MicroBatchTokens, Needs, TokenMetrics
from pipeline.config.types import PositiveFloat, Section, option
from pipeline.errors import UsageError

STABILISER = 1e-8
"""Added to both entropies, nats: the ratio of two zero entropies is 1."""


class EntropyRatioClipping(Piece):
    """Keeps the gradient of a token where low < q_t < high, q_t = H(pi(.|s_t)) / H(pi_old(.|s_t)).

    Su et al. 2025, "Entropy Ratio Clipping", arXiv 2512.05591. L_t <- K_t L_t + (1 - K_t) sg(L_t): the value and the
    denominator of the token mean stay, and the gate itself is not differentiated. It acts on top of the surrogate's
    clip. The first mini-batch of a batch has q = 1, so the gate needs `learner.minibatches` of at least 2 to act.
    """

    name = "erc"
    needs = Needs.OLD_ENTROPY | Needs.ENTROPY

    class Options(Section):
        low: Annotated[PositiveFloat, option("smallest entropy ratio that is trained, exclusive")] = 0.95
        high: Annotated[PositiveFloat, option("largest entropy ratio that is trained, exclusive")] = 1.05

    def __init__(self, options: Options) -> None:
        if not options.low < 1 < options.high:
            raise UsageError(f"erc: the band ({options.low}, {options.high}) must hold 1, the ratio without any change")
        super().__init__(options)

    def __call__(self, loss: torch.Tensor, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]"""
        ratio = (tokens.entropy.detach() + STABILISER) / (tokens.entropy_old + STABILISER)
        kept = (self.options.low < ratio) & (ratio < self.options.high)
        return torch.where(kept, loss, loss.detach()), {
            "entropy_ratio_kept": kept,
            "below": ratio <= self.options.low,
            "above": ratio >= self.options.high,
        }
