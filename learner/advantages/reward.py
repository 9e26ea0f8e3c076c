"""The reward itself as advantage."""

import torch

from learner.pieces import Piece
from learner.tokens import GroupRewards


class Reward(Piece):
    """A_i = R_i: no baseline.

    Williams 1992, REINFORCE. High variance; with rewards of 0 and 1 only right answers are learnt from.
    """

    name = "reward"

    def __call__(self, samples: GroupRewards) -> torch.Tensor:
        """float32 [S]"""
        return samples.rewards.clone()
