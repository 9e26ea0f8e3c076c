"""Token weights with the outliers masked."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.ratios import finite_or_zero, importance_ratio
from learner.tokens import BatchMetrics, BatchTokens, Needs
from pipeline.config.types import NonNegativeFloat, PositiveFloat, Section, option
from pipeline.errors import UsageError


class IcePop(Piece):
    """W_t = rho_t where low <= rho_t <= high, else 0, with rho_t = pi_old(y_t) / mu(y_t).

    IcePop (Ling team 2025, ringtech.notion.site/icepop), band 0.5 to 5. Without a lower bound and with `high` 5 it is
    the behaviour weight of AReaL's decoupled loss (arXiv 2505.24298) with its default rejection; with 0.5 to 1.5,
    batch normalisation and a veto, the weights of Sparse-RL (arXiv 2601.10079).
    """

    name = "icepop"
    needs = Needs.BEHAVIOUR_LOGPROBS
    weighs = True

    class Options(Section):
        low: Annotated[NonNegativeFloat, option("smallest ratio that is kept")] = 0.5
        high: Annotated[PositiveFloat, option("largest ratio that is kept")] = 5.0

    def __init__(self, options: Options) -> None:
        if not options.low <= 1 <= options.high:
            raise UsageError(
                f"icepop: the band [{options.low}, {options.high}] must hold 1, the ratio without mismatch"
            )
        super().__init__(options)

    def __call__(self, weight: torch.Tensor, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """float32 [N]"""
        ratio = finite_or_zero(importance_ratio(batch.logp_old, batch.logp_behaviour)).detach()
        below, above = ratio < self.options.low, ratio > self.options.high
        weight = weight * torch.where(below | above, torch.zeros_like(ratio), ratio)
        if not ratio.numel():
            return weight, {}
        return weight, {
            "below_fraction": float(below.float().mean()),
            "above_fraction": float(above.float().mean()),
            "ratio_mean": float(ratio.double().mean()),
            "ratio_min": float(ratio.min()),
            "ratio_max": float(ratio.max()),
        }
