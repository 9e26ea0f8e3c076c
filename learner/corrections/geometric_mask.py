"""Samples whose mean mismatch is too large are dropped."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.ratios import log_ratio
from learner.segments import sequence_mean
from learner.tokens import BatchMetrics, BatchTokens, Needs
from pipeline.config.types import PositiveFloat, Section, option
from pipeline.errors import UsageError


class GeometricMask(Piece):
    """Weight 0 for the tokens of samples whose geometric mean of rho_t = pi_old / mu is outside [low, high].

    "Geometric sequence masking" of the rollout corrections of verl (seq_mean_k1), SkyRL (0.99 to 1.01, the default
    here) and NeMo-RL (0.999 to 1.002). A pure mask, to be followed by token weights; not biased by length. The band is
    on rho itself, not on its inverse.
    """

    name = "geometric-mask"
    needs = Needs.BEHAVIOUR_LOGPROBS

    class Options(Section):
        low: Annotated[PositiveFloat, option("smallest geometric mean that is kept")] = 0.99
        high: Annotated[PositiveFloat, option("largest geometric mean that is kept")] = 1.01

    def __init__(self, options: Options) -> None:
        if not options.low <= 1 <= options.high:
            raise UsageError(f"geometric-mask: the band [{options.low}, {options.high}] must hold 1")
        super().__init__(options)

    def __call__(self, weight: torch.Tensor, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """float32 [N]"""
        mean = sequence_mean(log_ratio(batch.logp_old, batch.logp_behaviour).detach(), batch.sequence).exp()
        kept = (self.options.low <= mean) & (mean <= self.options.high)
        weight = torch.where(kept, weight, torch.zeros_like(weight))
        return weight, {"tokens_kept": float(kept.float().mean())} if kept.numel() else {}
