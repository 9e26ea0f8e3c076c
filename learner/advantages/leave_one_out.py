"""Leave-one-out advantages."""

import torch

from learner.pieces import Piece
from learner.tokens import GroupRewards


class LeaveOneOut(Piece):
    """A_i = R_i - mean of the other samples of its group; 0 in a group of one.

    Ahmadian et al. 2024, "Back to basics" (RLOO), arXiv 2402.14740, after Kool et al. 2019. It is n / (n - 1)
    times Dr. GRPO's estimator, and unbiased, since the baseline does not depend on the sample.
    """

    name = "leave-one-out"

    def __call__(self, samples: GroupRewards) -> torch.Tensor:
        """float32 [S]"""
        rewards = samples.rewards.double()
        _, inverse, counts = samples.groups.unique(return_inverse=True, return_counts=True)
        totals = rewards.new_zeros(len(counts)).index_add(0, inverse, rewards)[inverse]
        others = (counts - 1)[inverse]
        baseline = (totals - rewards) / others.clamp(min=1)
        return torch.where(others > 0, rewards - baseline, torch.zeros_like(rewards)).float()
