"""Negative samples that the policy has left behind are dropped."""

from typing import Annotated, Literal

import torch

from learner.pieces import Piece
from learner.segments import sequence_mean
from learner.tokens import MicroBatchTokens, Needs, TokenMetrics
from pipeline.config.types import NonNegativeFloat, Section, option


class OffPolicySequenceMask(Piece):
    """Loss 0 for samples with A < 0 whose mean log(anchor / pi) is above `threshold`, anchor mu or pi_old.

    "DeepSeek-V3.2", arXiv 2512.02556, off-policy sequence masking. With mu as anchor it sees staleness, numerics and
    the step so far; 0.5 is TRL's value, slime has 1e-4 against pi_old. A correction in purpose, it looks at the policy
    now and so acts at every optimiser step. Dropped samples stay in the denominator.
    """

    name = "opsm"
    needs = Needs.BEHAVIOUR_LOGPROBS

    class Options(Section):
        threshold: Annotated[NonNegativeFloat, option("largest mean log-ratio, nats a token")] = 0.5
        anchor: Annotated[Literal["behaviour", "old"], option("log-probs that pi is compared with")] = "behaviour"

    def __call__(self, loss: torch.Tensor, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]"""
        anchor = tokens.logp_behaviour if self.options.anchor == "behaviour" else tokens.logp_old
        distance = sequence_mean(anchor - tokens.logp.detach(), tokens.sequence)
        dropped = (tokens.advantage < 0) & (distance > self.options.threshold)
        return torch.where(dropped, torch.zeros_like(loss), loss), {"dropped": dropped}
