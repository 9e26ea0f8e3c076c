"""Entropy of the uncertain tokens held at its first value."""

from typing import Annotated

import torch
from msgspec import Meta

from learner.pieces import Piece
from learner.segments import sequence_quantile, sequence_sum
from learner.tokens import MicroBatchTokens, Needs, TokenMetrics
from pipeline.config.types import NonNegativeFloat, Section, option


class SIREN(Piece):
    """Adds coefficient * (H_bar - anchor)^2, H_bar the mean over samples of the mean of H'_t over their tokens from the
    `peak` quantile on, H' the entropy of pi renormalised on its nucleus of mass `top_p`.

    SIREN, arXiv 2509.25133. The anchor is H_bar of the first mini-batch of the run. The square is that of the whole
    mini-batch's H_bar: its gradient, 2 coefficient (H_bar - anchor) grad H_bar, adds up over micro-batches exactly.
    """

    name = "siren"
    needs = Needs.NUCLEUS_ENTROPY

    class Options(Section):
        coefficient: Annotated[NonNegativeFloat, option("weight of the squared distance")] = 0.005
        top_p: Annotated[Annotated[float, Meta(gt=0, le=1)], option("mass of the nucleus")] = 0.8
        peak: Annotated[Annotated[float, Meta(ge=0, lt=1)], option("quantile of a sample's entropies that counts")] = (
            0.8
        )

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.nucleus = options.top_p
        self._anchor: float | None = None

    def plan(self, tokens: MicroBatchTokens) -> torch.Tensor:
        """float64 [M, 3]: the token's share in H_bar, H_bar, and 1 / M."""
        entropy = tokens.nucleus_entropy.double()
        peak = (entropy >= sequence_quantile(entropy, tokens.sequence, self.options.peak)).double()
        samples = float(len(tokens.sequence.unique()))
        counts = torch.tensor([samples, float(len(entropy))], device=entropy.device).double()
        share = peak / (counts[0] * sequence_sum(peak, tokens.sequence).clamp(min=1))
        mean = (share * entropy).sum()
        if self._anchor is None and float(counts[1]):
            self._anchor = float(mean)
        return torch.stack([share, mean.expand_as(share), (1 / counts[1]).expand_as(share)], 1)

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]"""
        share, mean, one_in_m = tokens.planned.unbind(1)
        distance = mean - (self._anchor or 0.0)
        change = tokens.nucleus_entropy - tokens.nucleus_entropy.detach()
        # Value: an equal share of the square for each token. Gradient: that of the square, through H_bar's terms.
        term = self.options.coefficient * (distance.square() * one_in_m + 2 * distance * share * change)
        return (term / tokens.coefficient).to(tokens.logp.dtype), {"peak_entropy": mean}

    def state(self) -> dict[str, float]:
        return {} if self._anchor is None else {"anchor": self._anchor}

    def restore(self, state: dict[str, float]) -> None:
        self._anchor = state.get("anchor")
