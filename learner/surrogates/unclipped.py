"""The importance-weighted surrogate without a clip."""

import torch

from learner.pieces import Piece
from learner.ratios import importance_ratio
from learner.tokens import MicroBatchTokens, TokenMetrics


class Unclipped(Piece):
    """L = -A r, r = pi / pi_old.

    Schulman et al. 2017, arXiv 1707.06347, eq. 6 (conservative policy iteration). The base that KL-Cov (arXiv
    2505.22617) acts on; without such a gate nothing bounds the step.
    """

    name = "unclipped"

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]"""
        return -tokens.advantage * importance_ratio(tokens.logp, tokens.logp_old), {}
