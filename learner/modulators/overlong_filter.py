"""Answers cut off by the length limit are not learnt from."""

import torch

from learner.pieces import Piece
from learner.tokens import BatchMetrics, BatchTokens


class OverlongFilter(Piece):
    """A_t <- 0 for the tokens of samples that the length limit cut off.

    Yu et al. 2025, "DAPO", arXiv 2503.14476, section 3.4 (overlong filtering). The group's statistics still contain the
    reward of such a sample, and its tokens stay in the denominator.
    """

    name = "overlong-filter"

    def __call__(self, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """float32 [N]"""
        assert batch.samples is not None
        truncated = batch.samples.truncated[batch.sequence]
        return torch.where(truncated, torch.zeros_like(batch.advantage), batch.advantage), {}
