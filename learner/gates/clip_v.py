"""Negative samples' tokens that raise entropy too fast are left out, by the vocabulary's expectation."""

from typing import Annotated

import torch
from msgspec import Meta

from learner.gates.clip_b import discriminator
from learner.pieces import Piece
from learner.tokens import MicroBatchTokens, Needs, TokenMetrics
from pipeline.config.types import NonNegativeFloat, Section, option


class ClipV(Piece):
    """Loss 0 where A < 0 and D_t > mu std D, D_t = E_{v ~ pi}[S_v] - S_t, S_v = p_v (log p_v + H), for at most a share
    `fraction` of the tokens, those with the largest D.

    "On the entropy dynamics in reinforcement fine-tuning", arXiv 2602.03392 (Clip_V), with the values its code ships
    (mu 8.5; 2 in its constructor). The expectation is over the full vocabulary: sum_v p_v^2 (log p_v + H). Deviation
    (population) and order are over the whole mini-batch; at least one token may be left out; those left out stay in the
    denominator.
    """

    name = "clip-v"
    needs = Needs.ENTROPY | Needs.EXPECTED_SCORE

    class Options(Section):
        mu: Annotated[NonNegativeFloat, option("standard deviations from which tokens are left out")] = 8.5
        fraction: Annotated[Annotated[float, Meta(gt=0, le=1)], option("largest share that is left out")] = 1e-4

    def plan(self, tokens: MicroBatchTokens) -> torch.Tensor:
        """bool [M], tokens that are kept."""
        distance = tokens.expected_score.double() - discriminator(tokens)
        if not len(distance):
            return torch.ones_like(distance, dtype=torch.bool)
        candidate = (tokens.advantage < 0) & (distance > self.options.mu * distance.std(correction=0))
        ordered = torch.where(candidate, distance, -torch.inf).sort(descending=True).values
        most = max(1, int(self.options.fraction * len(ordered)))
        return ~(candidate & (distance >= ordered[most - 1]))

    def __call__(self, loss: torch.Tensor, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]"""
        return torch.where(tokens.planned, loss, torch.zeros_like(loss)), {"left_out": ~tokens.planned}
