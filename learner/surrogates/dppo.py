"""Policy gradient masked by the divergence of single tokens."""

from typing import Annotated, Literal

import torch

from learner.pieces import Piece
from learner.ratios import importance_ratio
from learner.tokens import MicroBatchTokens, TokenMetrics
from pipeline.config.types import PositiveFloat, Section, option

_TINY = 1e-8


class DPPO(Piece):
    """L = -A sg(min(r, cap)) log pi M, r = pi / pi_old; M is 0 where the token's probability has moved too far in the
    direction of the update.

    DPPO, arXiv 2602.04879. Divergence "tv": pi - pi_old > high with A > 0, or < -low otherwise. Divergence "kl": the
    binary KL of the two probabilities is above the bound and the probability has moved with the update. The paper takes
    mu for pi_old (`objective.proximal = "behaviour"`). With "tv", bounds of 0.2 and a squared log-ratio this is
    prime-rl's loss. Probabilities rather than ratios: a rare token may change by a large factor.
    """

    name = "dppo"

    class Options(Section):
        divergence: Annotated[Literal["tv", "kl"], option("total variation or KL of the token against the rest")] = "tv"
        low: Annotated[PositiveFloat, option("largest divergence where the advantage is not positive")] = 0.15
        high: Annotated[PositiveFloat, option("largest divergence where the advantage is positive")] = 0.15
        cap: Annotated[PositiveFloat, option("largest weight")] = 20.0

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]; `clip_fraction` counts masked tokens."""
        p, p_old = tokens.logp.detach().exp(), tokens.logp_old.exp()
        positive = tokens.advantage > 0
        bound = torch.where(positive, self.options.high, self.options.low)
        moved = torch.where(positive, p - p_old, p_old - p)
        if self.options.divergence == "tv":
            masked = moved > bound
        else:
            masked = (binary_kl(p_old, p) > bound) & (moved > 0)
        weight = importance_ratio(tokens.logp, tokens.logp_old).detach().clamp(max=self.options.cap)
        loss = -tokens.advantage * weight * tokens.logp
        return torch.where(masked, torch.zeros_like(loss), loss), {"clip_fraction": masked}


def binary_kl(p_old: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """KL of (p_old, 1 - p_old) from (p, 1 - p), nats; [T]."""
    same = p_old * (p_old.clamp(min=_TINY).log() - p.clamp(min=_TINY).log())
    return same + (1 - p_old) * ((1 - p_old + _TINY) / (1 - p + _TINY)).log()
