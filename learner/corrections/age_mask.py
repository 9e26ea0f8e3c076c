"""Tokens that are too old are dropped one by one."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.tokens import BatchMetrics, BatchTokens
from pipeline.config.types import Count, Section, option


class AgeMask(Piece):
    """Weight 0 for tokens sampled by a policy more than `publications` behind the newest.

    The token-level form of bounds on staleness such as prime-rl's `max_off_policy_steps` of 8; `learner.max_age` drops
    whole groups before they are trained.
    """

    name = "age-mask"

    class Options(Section):
        publications: Annotated[Count, option("largest age that is trained")] = 8

    def __call__(self, weight: torch.Tensor, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """float32 [N]"""
        kept = batch.age <= self.options.publications
        weight = torch.where(kept, weight, torch.zeros_like(weight))
        return weight, {"tokens_kept": float(kept.float().mean())} if kept.numel() else {}
