"""Group-relative advantages."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.tokens import GroupRewards
from pipeline.config.types import NonNegativeFloat, Section, option


class GRPO(Piece):
    """A_i = (R_i - mean of its group) / (std of its group + epsilon), the same for all tokens of sample i.

    Shao et al. 2024, "DeepSeekMath", arXiv 2402.03300, section 4.1.2. The standard deviation is the sample one (n - 1),
    as the common implementations have it. A group of one, or whose rewards are all equal, has advantage 0. Without
    `normalise_std` this is the estimator of Dr. GRPO (arXiv 2503.20783).
    """

    name = "grpo"

    class Options(Section):
        normalise_std: Annotated[bool, option("divide by the group's standard deviation")] = True
        population_std: Annotated[bool, option("standard deviation over n instead of n - 1")] = False
        epsilon: Annotated[NonNegativeFloat, option("added to the standard deviation")] = 1e-6

    def __call__(self, samples: GroupRewards) -> torch.Tensor:
        """float32 [S]"""
        rewards = samples.rewards.double()
        advantages = torch.zeros_like(rewards)
        for group in samples.groups.unique():
            members = samples.groups == group
            reward = rewards[members]
            # Equal rewards have no deviation to divide by; without an epsilon that would be 0 / 0.
            if reward.numel() < 2 or bool(reward.min() == reward.max()):
                continue
            advantage = reward - reward.mean()
            if self.options.normalise_std:
                deviation = reward.std(correction=0 if self.options.population_std else 1)
                advantage = advantage / (deviation + self.options.epsilon)
            advantages[members] = advantage
        return advantages.float()
