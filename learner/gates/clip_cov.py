"""A few tokens of high covariance are left out."""

from typing import Annotated

import torch
from msgspec import Meta

from learner.gates.covariance import covariance
from learner.pieces import Piece
from learner.ratios import importance_ratio
from learner.tokens import MicroBatchTokens, TokenMetrics
from pipeline.config.types import NonNegativeFloat, Section, option
from pipeline.errors import UsageError


class ClipCov(Piece):
    """Loss 0 for a few random tokens with low < cov_t < high, cov_t = (A_t - mean A)(log pi_t - mean log pi).

    Cui et al. 2025, "The entropy mechanism of RL", arXiv 2505.22617 (Clip-Cov). max(1, int(fraction N)) of the N tokens
    are chosen, uniformly among those in the band whose ratio is inside (1 - clip_low, 1 + clip_high), which the authors
    set to 1 for the surrogate too. Means and choice are over the whole mini-batch; the left-out tokens stay in the
    denominator.
    """

    name = "clip-cov"

    class Options(Section):
        low: Annotated[float, option("smallest covariance of a candidate")] = 1.0
        high: Annotated[float, option("largest covariance of a candidate")] = 5.0
        fraction: Annotated[Annotated[float, Meta(gt=0, le=1)], option("share of all tokens that is left out")] = 2e-4
        clip_low: Annotated[NonNegativeFloat, option("candidates have a ratio above 1 minus this")] = 1.0
        clip_high: Annotated[NonNegativeFloat, option("candidates have a ratio below 1 plus this")] = 1.0

    def __init__(self, options: Options) -> None:
        if options.low >= options.high:
            raise UsageError(
                f"clip-cov: low = {options.low} must be below high = {options.high}, or no token is between"
            )
        super().__init__(options)

    def plan(self, tokens: MicroBatchTokens) -> torch.Tensor:
        """bool [M], tokens that are kept."""
        cov = covariance(tokens)
        ratio = importance_ratio(tokens.logp, tokens.logp_old)
        clipped = ((ratio < 1 - self.options.clip_low) & (tokens.advantage < 0)) | (
            (ratio > 1 + self.options.clip_high) & (tokens.advantage > 0)
        )
        candidate = (self.options.low < cov) & (cov < self.options.high) & ~clipped
        draws = torch.where(candidate, tokens.uniform, 2.0).sort().values
        if not len(draws):
            return ~candidate
        wanted = max(1, int(self.options.fraction * len(draws)))
        return ~candidate | (tokens.uniform > draws[wanted - 1])

    def __call__(self, loss: torch.Tensor, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]"""
        return torch.where(tokens.planned, loss, torch.zeros_like(loss)), {"left_out": ~tokens.planned}
