"""Entropy bonus."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.tokens import MicroBatchTokens, Needs, TokenMetrics
from pipeline.config.types import Section, option


class EntropyBonus(Piece):
    """Adds -coefficient * H(pi(.|s_t)) to the loss of each token: a positive coefficient keeps entropy up.

    Mnih et al. 2016, "Asynchronous methods for deep reinforcement learning", arXiv 1602.01783, section 4, whose
    value is 0.01; language models usually take 0.001 or less.
    """

    name = "entropy-bonus"
    needs = Needs.ENTROPY_GRADIENT

    class Options(Section):
        coefficient: Annotated[float, option("weight of the entropy, in nats")] = 0.01

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]"""
        term = -self.options.coefficient * tokens.entropy
        return term, {"loss": term.detach()}
