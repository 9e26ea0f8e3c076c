"""Mean over samples of the sum over their tokens, divided by a constant."""

from typing import Annotated

import torch

from learner.aggregations.sequence_mean import sample_count
from learner.pieces import Piece
from learner.tokens import Layout
from pipeline.config.types import Count, Section, option


class ConstantHorizon(Piece):
    """L = (1 / (S h)) sum over all tokens, S the samples that have a trained token, h a constant of the run.

    Liu et al. 2025, "Understanding R1-Zero-like training" (Dr. GRPO), arXiv 2503.20783, section 3.2: no token's weight
    depends on the length of its answer. Belongs to advantages that are not divided by the group's deviation.
    """

    name = "constant-horizon"

    class Options(Section):
        horizon: Annotated[Count, option("constant h, in tokens; 0: sampling.max_new_tokens")] = 0

    def __call__(self, layout: Layout) -> torch.Tensor:
        """float32 [M]"""
        horizon = self.options.horizon or layout.max_response_tokens
        return (1 / (sample_count(layout) * max(horizon, 1))).expand(len(layout.sequence))
