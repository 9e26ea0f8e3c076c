"""A sample with one impossible token is dropped."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.ratios import log_ratio
from learner.segments import positions, sequence_any
from learner.tokens import BatchMetrics, BatchTokens, Needs
from pipeline.config.types import NonNegativeFloat, PositiveFloat, Section, option
from pipeline.errors import UsageError


class Veto(Piece):
    """Weight 0 for all tokens of a sample in which any rho_t = pi_old / mu is below `low` (or above `high`).

    The veto of Sparse-RL (arXiv 2601.10079) and slime, 1e-4; SkyRL's outlier mask also has an upper bound of 100. Where
    a cache is compressed such tokens mark the places at which context that was needed had gone. A pure mask.
    """

    name = "veto"
    needs = Needs.BEHAVIOUR_LOGPROBS

    class Options(Section):
        low: Annotated[PositiveFloat, option("smallest ratio a sample may hold")] = 1e-4
        high: Annotated[NonNegativeFloat, option("largest ratio a sample may hold; 0: any")] = 0.0

    def __init__(self, options: Options) -> None:
        if options.low >= 1 or 0 < options.high <= 1:
            raise UsageError(
                f"veto: low = {options.low} must be below 1, and high = {options.high} above it or 0: 1 is the ratio "
                "without mismatch"
            )
        super().__init__(options)

    def __call__(self, weight: torch.Tensor, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """float32 [N]"""
        ratio = log_ratio(batch.logp_old, batch.logp_behaviour).detach().exp()
        outlier = ratio < self.options.low
        if self.options.high:
            outlier = outlier | (ratio > self.options.high)
        vetoed = sequence_any(outlier, batch.sequence)
        weight = torch.where(vetoed, torch.zeros_like(weight), weight)
        if not vetoed.numel():
            return weight, {}
        samples = batch.sequence.unique().numel()
        metrics = {
            "tokens_kept": float((~vetoed).float().mean()),
            "vetoed_samples": batch.sequence[vetoed].unique().numel() / samples,
        }
        if bool(outlier.any()):
            metrics["outlier_position"] = float(positions(batch.sequence)[outlier].double().mean())
        return weight, metrics
