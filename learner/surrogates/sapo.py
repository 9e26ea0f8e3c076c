"""A soft gate in place of the clip."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.ratios import importance_ratio
from learner.tokens import MicroBatchTokens, TokenMetrics
from pipeline.config.types import PositiveFloat, Section, option


class SAPO(Piece):
    """L = -A f(r), f(r) = (4 / tau) sigmoid(tau (r - 1)), r = pi / pi_old; tau differs between positive and negative A.

    SAPO, arXiv 2511.20347. The gradient's weight, f'(r) r, is 1 at r = 1 and falls smoothly on both sides. Defined as a
    mean over samples of means over tokens.
    """

    name = "sapo"
    aggregations = ("sequence-mean",)

    class Options(Section):
        tau_positive: Annotated[PositiveFloat, option("sharpness where the advantage is positive")] = 1.0
        tau_negative: Annotated[PositiveFloat, option("sharpness where it is not")] = 1.05

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]"""
        ratio = importance_ratio(tokens.logp, tokens.logp_old)
        tau = torch.full_like(tokens.advantage, self.options.tau_negative)
        tau = torch.where(tokens.advantage > 0, torch.full_like(tau, self.options.tau_positive), tau)
        gate = torch.sigmoid(tau * (ratio - 1))
        return -tokens.advantage * gate * 4 / tau, {"gate": (4 * gate * (1 - gate)).detach()}
