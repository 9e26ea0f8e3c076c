"""Entropy-modulated policy gradients for agents that act in steps."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.tokens import BatchMetrics, BatchTokens, Needs
from pipeline.config.types import Count, NonNegativeFloat, Section, option

_TINY = 1e-8


class EMPG(Piece):
    """A_k <- A g(H_k) + zeta f(H_{k+1}) for step k of an agent, then less the mean over all steps of the batch.

    EMPG, arXiv 2509.09265. H_k is the mean entropy of the step's generated tokens, h_k = (H_k - min) / (max - min)
    over the steps of the batch, g = exp(-kappa h) / mean(exp(-kappa h)), f = exp(-kappa' h); the last step of a sample
    has no f. All statistics are over the steps of the whole batch.

    The paper's steps are what an agent generates between two observations, which stand in a sample as environment
    tokens: `turns` says that engines of your own record them, the two here do not. Ours: `ends` divides an answer of
    one turn, a step ending with any of these tokens, such as the tokenizer's newline. Without a border every sample
    would be one step, so one of the two is asked for.
    """

    name = "empg"
    needs = Needs.OLD_ENTROPY

    class Options(Section):
        ends: Annotated[tuple[Count, ...], option("token ids that end a step")] = ()
        turns: Annotated[bool, option("environment tokens divide samples into steps: an engine records them")] = False
        kappa: Annotated[NonNegativeFloat, option("how much uncertain steps are damped")] = 1.0
        kappa_next: Annotated[NonNegativeFloat, option("how much the bonus prefers certain next steps")] = 1.0
        zeta: Annotated[NonNegativeFloat, option("weight of the bonus for the next step's certainty")] = 0.1

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.one_step = not (options.ends or options.turns)  # type: ignore[misc]

    def __call__(self, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """float32 [N]"""
        if not len(batch.sequence):
            return batch.advantage, {}
        step, sequence, entropy = _steps(batch, self.options.ends)
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


def _steps(batch: BatchTokens, ends: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each token the index of its step [N]; of each step its sample [K] and its mean entropy, float64 [K]."""
    ended = torch.zeros_like(batch.sequence)
    if ends:
        last = torch.isin(batch.token, torch.tensor(ends, device=batch.token.device))
        # Counted on from the samples before: only differences within a sample matter.
        ended = last.cumsum(0) - last.long()
    keys, index = torch.stack([batch.sequence, batch.turn, ended], 1).unique(dim=0, return_inverse=True)
    entropy = batch.entropy_old.double()
    sums = entropy.new_zeros(len(keys)).index_add(0, index, entropy)
    return index, keys[:, 0], sums / index.bincount(minlength=len(keys))
