"""Tokens whose mismatch is too large are dropped, one by one."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.ratios import log_ratio
from learner.tokens import BatchMetrics, BatchTokens, Needs
from pipeline.config.types import NonNegativeFloat, PositiveFloat, Section, option
from pipeline.errors import UsageError


class TokenMask(Piece):
    """Weight 0 for tokens whose rho_t = pi_old / mu is outside [low, high].

    IcePop's band without its weight, as SkyRL has it (0.5 to 2) and verl's token_k1. A pure mask, to stand beside token
    or sequence weights. The band is on rho itself, not on its inverse.
    """

    name = "token-mask"
    needs = Needs.BEHAVIOUR_LOGPROBS

    class Options(Section):
        low: Annotated[NonNegativeFloat, option("smallest ratio that is kept")] = 0.5
        high: Annotated[PositiveFloat, option("largest ratio that is kept")] = 2.0

    def __init__(self, options: Options) -> None:
        if not options.low <= 1 <= options.high:
            raise UsageError(f"token-mask: the band [{options.low}, {options.high}] must hold 1")
        super().__init__(options)

    def __call__(self, weight: torch.Tensor, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """float32 [N]"""
        ratio = log_ratio(batch.logp_old, batch.logp_behaviour).detach().exp()
        below, above = ratio < self.options.low, ratio > self.options.high
        kept = ~below & ~above & ratio.isfinite()
        weight = torch.where(kept, weight, torch.zeros_like(weight))
        if not kept.numel():
            return weight, {}
        return weight, {
            "tokens_kept": float(kept.float().mean()),
            "below_fraction": float(below.float().mean()),
            "above_fraction": float(above.float().mean()),
        }
