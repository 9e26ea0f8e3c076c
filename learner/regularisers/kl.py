"""Divergence from a reference model."""

from typing import Annotated, Literal

import torch

from learner.pieces import Piece
from learner.ratios import LOG_RATIO_BOUND, importance_ratio, unit_ratio
from learner.tokens import MicroBatchTokens, Needs, TokenMetrics
from pipeline.config.types import NonNegativeFloat, Section, option
from pipeline.errors import UsageError

_VALUE_BOUND = 10.0


class KLToReference(Piece):
    """Adds coefficient * KL estimate from x = log pi_ref - log pi: k1 = -x, k2 = x^2 / 2, k3 = e^x - x - 1, or "k3+",
    the value of k3 with the gradient of k2.

    Schulman 2020, "Approximating KL divergence"; k3 as a loss is GRPO's (arXiv 2402.03300, eq. 4), whose gradient is
    biased; k2's is that of the reverse KL on samples of the policy. `score` multiplies the estimate by pi / pi_old with
    gradient ("ratio": the unbiased KL of DeepSeek-V3.2, arXiv 2512.02556) or by pi / sg(pi) ("policy": arXiv
    2506.09477), which adds the term that differentiating only the estimate leaves out. k1 alone has expected gradient 0
    and is refused. x is bounded by +-20, estimates by +-10. The reference is `learner.reference_path`, or the initial
    weights.
    """

    name = "kl"
    needs = Needs.REFERENCE

    class Options(Section):
        coefficient: Annotated[NonNegativeFloat, option("weight of the divergence")] = 1e-3
        estimator: Annotated[Literal["k1", "k2", "k3", "k3+"], option("estimate of the divergence")] = "k3"
        score: Annotated[Literal["none", "ratio", "policy"], option("factor that carries the score-function term")] = (
            "none"
        )

    def __init__(self, options: Options) -> None:
        if options.estimator == "k1" and options.score == "none":
            raise UsageError('kl: estimator = "k1" has no gradient in expectation; set score, or take k2 or k3')
        super().__init__(options)

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """float32 [T]"""
        x = (tokens.logp_reference - tokens.logp).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        k2, k3 = x.square() / 2, torch.expm1(x) - x
        estimate = {"k1": -x, "k2": k2, "k3": k3, "k3+": k3.detach() + k2 - k2.detach()}[self.options.estimator]
        estimate = estimate.clamp(-_VALUE_BOUND, _VALUE_BOUND)
        if self.options.score == "ratio":
            estimate = estimate * importance_ratio(tokens.logp, tokens.logp_old)
        elif self.options.score == "policy":
            estimate = estimate * unit_ratio(tokens.logp)
        return self.options.coefficient * estimate, {"estimate": estimate.detach()}
