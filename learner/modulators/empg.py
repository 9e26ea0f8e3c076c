"""Entropy-modulated policy gradients for agents that act in steps."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.tokens import BatchMetrics, BatchTokens, Needs
from pipeline.config.types import NonNegativeFloat, Section, option

_TINY = 1e-8


class EMPG(Piece):
    """A_k <- A g(H_k) + zeta f(H_{k+1}) for step k of an agent, then less the mean over all steps of the batch.

    EMPG, arXiv 2509.09265. H_k is the mean entropy of the step's generated tokens, h_k = (H_k - min) / (max - min)
    over the steps of the batch, g = exp(-kappa h) / mean(exp(-kappa h)), f = exp(-kappa' h); the last step of a sample
    has no f. Steps are runs of generated tokens between environment tokens, so without environment tokens a sample is
    one step. All statistics are over the steps of the whole batch.
    """

    name = "empg"
    needs = Needs.OLD_ENTROPY

    class Options(Section):
        kappa: Annotated[NonNegativeFloat, option("how much uncertain steps are damped")] = 1.0
        kappa_next: Annotated[NonNegativeFloat, option("how much the bonus prefers certain next steps")] = 1.0
        zeta: Annotated[NonNegativeFloat, option("weight of the bonus for the next step's certainty")] = 0.1

    def __call__(self, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """float32 [N]"""
        if not len(batch.sequence):
            return batch.advantage, {}
        step, sequence, entropy = _steps(batch)
        advantage = batch.advantage.new_zeros(len(sequence)).index_copy(0, step, batch.advantage).double()
        low, high = entropy.min(), entropy.max()
        uncertainty = (entropy - low) / (high - low + _TINY)
        damping = (-self.options.kappa * uncertainty).exp()
        damping = damping / damping.mean()
        bonus = self.options.zeta * (-self.options.kappa_next * uncertainty).exp()
        has_next = torch.cat([sequence[1:] == sequence[:-1], sequence.new_zeros(1, dtype=torch.bool)])
        modulated = advantage * damping + torch.where(has_next, bonus.roll(-1), torch.zeros_like(bonus))
        modulated = modulated - modulated.mean()
        return modulated[step].float(), {"steps": float(len(sequence)), "damping_min": float(damping.min())}


def _steps(batch: BatchTokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each token the index of its step [N]; of each step its sample [K] and its mean entropy, float64 [K]."""
    keys, index = torch.stack([batch.sequence, batch.turn], 1).unique(dim=0, return_inverse=True)
    entropy = batch.entropy_old.double()
    sums = entropy.new_zeros(len(keys)).index_add(0, index, entropy)
    return index, keys[:, 0], sums / index.bincount(minlength=len(keys))
