"""Group-relative advantages whose statistics are taken over tokens."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.tokens import GroupRewards
from pipeline.config.types import NonNegativeFloat, PositiveFloat, Section, option


class TokenGroup(Piece):
    """A_i = (R_i - m) / (s + epsilon), mean m and population deviation s over all trained tokens of the group, each of
    which carries its sample's reward.

    HAPO, arXiv 2509.16591 (token-level group average): the loss of a group, a mean over tokens, has
    mean advantage 0 whatever the lengths. A group in which that gives an advantage of `fallback` or more falls back to
    GRPO's statistics over samples.
    """

    name = "token-group"

    class Options(Section):
        epsilon: Annotated[NonNegativeFloat, option("added to the standard deviation")] = 1e-6
        fallback: Annotated[PositiveFloat, option("largest |advantage| before the group falls back to GRPO")] = 5.0

    def __call__(self, samples: GroupRewards) -> torch.Tensor:
        """float32 [S]"""
        advantages = torch.zeros(len(samples.rewards), dtype=torch.float64)
        for group in samples.groups.unique():
            members = samples.groups == group
            reward, tokens = samples.rewards[members].double(), samples.lengths[members].double()
            if reward.numel() < 2 or bool(reward.min() == reward.max()):
                continue
            advantage = self._standardised(reward, tokens, correction=0)
            if not bool(tokens.sum()) or bool(advantage.abs().max() >= self.options.fallback):
                advantage = self._standardised(reward, torch.ones_like(reward), correction=1)
            advantages[members] = advantage
        return advantages.float()

    def _standardised(self, reward: torch.Tensor, count: torch.Tensor, correction: int) -> torch.Tensor:
        """Rewards standardised, each counted `count` times."""
        total = count.sum()
        centred = reward - (count * reward).sum() / total
        deviation = ((count * centred.square()).sum() / (total - correction)).sqrt()
        return centred / (deviation + self.options.epsilon)
