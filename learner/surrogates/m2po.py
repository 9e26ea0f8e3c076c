"""Second-moment trust region on stale data."""

from typing import Annotated

import torch

from learner.pieces import Piece
from learner.ratios import LOG_RATIO_BOUND
from learner.tokens import MicroBatchTokens, Needs, TokenMetrics
from pipeline.config.types import PositiveFloat, Section, option


class M2PO(Piece):
    """L = -A w on kept tokens, w = pi / mu. Candidates for dropping are tokens whose ratio already moved with the
    update (A > 0 and w > 1, or A < 0 and w < 1); of them those with the smallest (log w)^2 are kept whose mean is at
    most `second_moment`.

    M2PO, arXiv 2510.01161. The mean is over the whole optimiser mini-batch. Dropped tokens stay in the denominator.
    log w is bounded by +-20 in value, not in gradient. The ratio goes down to mu: no further importance weight belongs
    here.
    """

    name = "m2po"
    needs = Needs.BEHAVIOUR_LOGPROBS
    weighs = True

    class Options(Section):
        second_moment: Annotated[PositiveFloat, option("largest mean of (log w)^2 over the candidates")] = 0.04

    def plan(self, tokens: MicroBatchTokens) -> torch.Tensor:
        """bool [M], tokens that are kept."""
        log = tokens.logp - tokens.logp_behaviour
        candidate = ((tokens.advantage > 0) & (log > 0)) | ((tokens.advantage < 0) & (log < 0))
        square = log.double().square()
        threshold = second_moment_threshold(square[candidate], self.options.second_moment)
        return ~candidate | (square <= threshold)

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]; `clip_fraction` counts dropped tokens."""
        log = tokens.logp - tokens.logp_behaviour
        log = log + (log.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND) - log).detach()
        loss = -tokens.advantage * log.exp()
        return torch.where(tokens.planned, loss, torch.zeros_like(loss)), {"clip_fraction": ~tokens.planned}


def second_moment_threshold(squares: torch.Tensor, bound: float) -> float:
    """The largest value of the longest run of smallest squares whose mean is at most `bound`; below 0: none."""
    ordered = squares.sort().values
    means = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
    kept = int((means <= bound).sum())
    return float(ordered[kept - 1]) if kept else -1.0
