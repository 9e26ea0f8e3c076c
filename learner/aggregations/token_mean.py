"""Mean over the trained tokens of an optimiser mini-batch."""

import torch

from learner.pieces import Piece
from learner.tokens import Layout


class TokenMean(Piece):
    """L = (1 / N) sum over tokens, N the trained tokens of the optimiser mini-batch over all ranks.

    Yu et al. 2025, "DAPO", arXiv 2503.14476, eq. 12: long answers weigh as much as their tokens.
    """

    name = "token-mean"

    def __call__(self, layout: Layout) -> torch.Tensor:
        """float32 [M]"""
        count = torch.tensor(float(len(layout.sequence)), device=layout.sequence.device)
        return (1 / count).expand(len(layout.sequence))
