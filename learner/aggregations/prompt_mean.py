"""Mean over prompts of the mean over the tokens of their answers."""

import torch

from learner.pieces import Piece
from learner.tokens import Layout


class PromptMean(Piece):
    """L = (1 / G) sum over prompts g of (1 / N_g) sum over the tokens of all of g's answers in the mini-batch.

    G counts the prompts with a trained token. The "prompt mean" of SkyRL's documentation of loss reductions: prompts
    weigh the same, tokens of a prompt's answers weigh the same.
    """

    name = "prompt-mean"

    def __call__(self, layout: Layout) -> torch.Tensor:
        """float32 [M]"""
        groups, counts = layout.group.unique(return_counts=True)
        own = torch.searchsorted(groups, layout.group)
        return 1 / (len(groups) * counts[own].float())
