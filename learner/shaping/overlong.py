"""Punishment of answers that come near the length limit."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.tokens import GroupRewards
from pipeline.config.types import Count, NonNegativeFloat, Section, option
from pipeline.errors import UsageError


class OverlongPunishment(Piece):
    """R <- R + min(0, -(|y| - (limit - buffer)) / buffer * factor): 0 before the buffer, -factor at the limit.

    Yu et al. 2025, "DAPO", arXiv 2503.14476, eq. 13 (soft overlong punishment); there the limit is 20480 tokens and the
    buffer 4096, a fifth of it, which is what 0 stands for.
    """

    name = "overlong"

    class Options(Section):
        limit: Annotated[Count, option("longest response, in tokens; 0: sampling.max_new_tokens")] = 0
        buffer: Annotated[Count, option("tokens before the limit in which the punishment grows; 0: limit / 5")] = 0
        factor: Annotated[NonNegativeFloat, option("punishment at the limit")] = 1.0

    def __init__(self, options: Options) -> None:
        if 0 < options.limit < options.buffer:
            raise UsageError(f"overlong: buffer = {options.buffer} must not be above limit = {options.limit}")
        super().__init__(options)

    def __call__(self, samples: GroupRewards) -> torch.Tensor:
        """float32 [S]"""
        limit = self.options.limit or samples.max_response_tokens
        buffer = self.options.buffer or max(1, limit // 5)
        beyond = (samples.response_lengths.float() - (limit - buffer)) / buffer
        return samples.rewards - self.options.factor * beyond.clamp(min=0)
