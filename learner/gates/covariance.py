"""What Clip-Cov and KL-Cov share: how much each token's update will move the entropy."""

import torch

from learner.tokens import MicroBatchTokens


def covariance(tokens: MicroBatchTokens) -> torch.Tensor:
    """(A_t - mean A)(log pi_t - mean log pi), float64 [M]; means over the whole mini-batch and all ranks.

    arXiv 2505.22617, eq. 10: averaged over tokens it is the covariance whose negative the entropy change is.
    """
    advantage, logp = tokens.advantage.double(), tokens.logp.double()
    if not len(logp):
        return logp
    return (advantage - advantage.mean()) * (logp - logp.mean())
