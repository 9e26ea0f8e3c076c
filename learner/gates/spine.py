"""Only forking tokens are trained, and their entropy is kept in a band."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.tokens import MicroBatchTokens, Needs, TokenMetrics
from pipeline.config.types import NonNegativeFloat, PositiveInt, Section, option


class SPINE(Piece):
    """Loss 0 where the token is not a forking one; L_t + beta_low relu(lo - H_t) + beta_high relu(H_t - hi) where it
    is.

    SPINE, arXiv 2511.17938. Forking tokens are those of a sample whose entropy is at least Otsu's threshold of its
    entropies; hi is the median of their entropies, lo = max(0, hi - max(1.4826 MAD, 1e-6)). Bands are detached.
    Reconstructed from an independent implementation; the paper's betas are not known to us. Its KL term over the
    selected tokens is left out for the same reason.
    """

    name = "spine"
    needs = Needs.ENTROPY_GRADIENT
    reconstructed = True

    class Options(Section):
        beta_low: Annotated[NonNegativeFloat, option("weight of entropy below the band")] = 0.01
        beta_high: Annotated[NonNegativeFloat, option("weight of entropy above the band")] = 0.01
        bins: Annotated[PositiveInt, option("bins of the histogram for Otsu's threshold")] = 100

    def __call__(self, loss: torch.Tensor, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]"""
        entropy = tokens.entropy.detach()
        selected, low, high = torch.zeros_like(entropy, dtype=torch.bool), entropy.clone(), entropy.clone()
        for sequence in tokens.sequence.unique():
            own = tokens.sequence == sequence
            forking = entropy[own] >= otsu_threshold(entropy[own], self.options.bins)
            middle = median(entropy[own][forking])
            spread = (1.4826 * median((entropy[own][forking] - middle).abs())).clamp(min=1e-6)
            selected[own], low[own], high[own] = forking, (middle - spread).clamp(min=0), middle
        band = self.options.beta_low * torch.relu(low - tokens.entropy)
        band = band + self.options.beta_high * torch.relu(tokens.entropy - high)
        return torch.where(selected, loss + band, torch.zeros_like(loss)), {
            "selected": selected,
            "band_loss": torch.where(selected, band.detach(), torch.zeros_like(entropy)),
        }


def otsu_threshold(values: torch.Tensor, bins: int) -> torch.Tensor:
    """The edge that divides the histogram into two classes with the largest variance between them (Otsu 1979), the
    lowest such edge; the smallest value where all are equal."""
    low, high = values.min().double(), values.max().double()
    if bool(low == high):
        return low
    counts = torch.histc(values.double().cpu(), bins, float(low), float(high)).to(values.device)
    centres = low + (torch.arange(bins, device=values.device) + 0.5) * (high - low) / bins
    below, moment = counts.cumsum(0), (counts * centres).cumsum(0)
    above = below[-1] - below
    means = moment / below.clamp(min=1), (moment[-1] - moment) / above.clamp(min=1)
    return low + (int((below * above * (means[0] - means[1]).square()).argmax()) + 1) * (high - low) / bins


def median(values: torch.Tensor) -> torch.Tensor:
    """The mean of the two middle values where their number is even."""
    ordered = values.sort().values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
