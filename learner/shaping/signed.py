"""Rewards of 0 and 1 as -1 and 1."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.tokens import GroupRewards
from pipeline.config.types import Section, option


class SignedRewards(Piece):
    """R <- scale R + shift, by default 2 R - 1: an answer that is right earns 1, one that is wrong costs 1.

    The reward of DAPO, arXiv 2503.14476, eq. 7. Methods that look at the sign of the raw reward need it. Advantages
    within a group do not change by it, as far as they are divided by the group's deviation.
    """

    name = "signed"

    class Options(Section):
        scale: Annotated[float, option("multiplies the reward")] = 2.0
        shift: Annotated[float, option("is added after that")] = -1.0

    def __call__(self, samples: GroupRewards) -> torch.Tensor:
        """float32 [S]"""
        return samples.rewards * self.options.scale + self.options.shift
