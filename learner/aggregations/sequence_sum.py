"""Mean over samples of the sum over their tokens."""

import torch

from learner.aggregations.sequence_mean import sample_count
from learner.pieces import Piece
from learner.tokens import Layout


class SequenceSum(Piece):
    """L = (1 / S) sum over all tokens, S the samples that have a trained token.

    The policy gradient of a whole answer (Williams 1992, REINFORCE): the log-prob of an answer is the sum of
    those of its tokens. Its size grows with the answers' length.
    """

    name = "sequence-sum"

    def __call__(self, layout: Layout) -> torch.Tensor:
        """float32 [M]"""
        return (1 / sample_count(layout)).expand(len(layout.sequence))
