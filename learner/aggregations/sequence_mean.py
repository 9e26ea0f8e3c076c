"""Mean over samples of the mean over their tokens."""

import torch

from learner.pieces import Piece
from learner.segments import sequence_length
from learner.tokens import Layout


class SequenceMean(Piece):
    """L = (1 / S) sum over samples i of (1 / |y_i|) sum over tokens t, S the samples that have a trained token.

    Shao et al. 2024, "DeepSeekMath" (GRPO), arXiv 2402.03300, eq. 3; required by GSPO, GMPO and SAPO. A token of a
    short answer weighs more than one of a long answer.
    """

    name = "sequence-mean"

    def __call__(self, layout: Layout) -> torch.Tensor:
        """float32 [M]"""
        return 1 / (sample_count(layout) * sequence_length(layout.sequence))


def sample_count(layout: Layout) -> torch.Tensor:
    """Samples of the mini-batch with a trained token, over all ranks; float32 scalar."""
    return torch.tensor(float(len(layout.sequence.unique())), device=layout.sequence.device)
