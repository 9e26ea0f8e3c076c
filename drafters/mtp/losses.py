"""What a draft head is trained for, from its distribution q and the target's p at each depth.

alpha = sum_v min(p_v, q_v) is the chance that a token drawn from q is accepted, and 1 - alpha their total variation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOSSES = ("ce", "kl", "tv", "e2e-tv", "lk-alpha", "lk-lambda")
NEEDS_WARM_UP = ("tv", "e2e-tv")
"""whose gradient all but vanishes at a head that knows nothing: of order sqrt(k) / V where p is on k tokens"""
ETA = 3.0
"""of lk-lambda, for one-layer heads (LK losses, arXiv 2602.23881)"""
FLOOR = 1e-5


class _Acceptance(torch.autograd.Function):
    """alpha [N] of logits [N, V] and p [N, V]: d alpha / d z_v = q_v (1[q_v <= p_v] - S), S = sum of q_v <= p_v.

    Bebop (arXiv 2606.12370). The gradient is computed with the value, so that neither q nor the mask is kept.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, p: Tensor) -> Tensor:
        q = torch.softmax(logits, -1, dtype=torch.float32)
        alpha = torch.minimum(p, q).sum(-1)
        below = q.masked_fill(q > p, 0)
        ctx.save_for_backward(below.addcmul_(q, below.sum(-1, keepdim=True), value=-1).to(logits.dtype))
        return alpha.clamp(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope * grad.unsqueeze(-1).to(slope.dtype), None


def acceptance(logits: Tensor, p: Tensor) -> Tensor:
    """alpha [N], differentiable in logits [N, V]; p [N, V] float32 is constant."""
    alpha: Tensor = _Acceptance.apply(logits, p)
    return alpha


def kl_divergence(logits: Tensor, p: Tensor) -> Tensor:
    """KL(p || q) [N] in nats."""
    log_q = F.log_softmax(logits.float(), -1)
    return torch.special.xlogy(p, p).sum(-1) - (p * log_q).sum(-1)


def expected_accepted(alphas: Tensor) -> Tensor:
    """[N], expected share of accepted tokens in drafts of K, (1/K) sum_j prod_{i<=j} alpha_i, of alphas [N, K]."""
    return alphas.cumprod(-1).mean(-1)


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss over drafts of K tokens. `e2e-tv` is 1 - (1/K) sum_j prod_{i<=j} alpha_i (Bebop, Eq. 13); the others are
    means over depths, weighted by `depth_decay` to the power of depth - 1."""

    name: str
    depth_decay: float = 0.8

    def __call__(
        self, logits: Sequence[Tensor], p: Sequence[Tensor], tokens: Sequence[Tensor], valid: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The part of N rows in the loss, and their alphas [N, K], detached; 0 where not valid.

        Args:
            logits: [N, V] of each depth.
            p: float32 [N, V], the target's distributions at each depth.
            tokens: int64 [N] of each depth: the text's own, for `ce`.
            valid: bool [N, K], a prefix of each row.
            counts: float32 [K], valid rows of each depth in the whole batch.
        """
        differentiable = self.name not in ("ce", "kl")
        alphas: list[Tensor] = []
        weights = self.depth_decay ** torch.arange(len(logits), device=valid.device)
        weights = weights / weights.sum() / counts.clamp_min(1)
        total = valid.new_zeros((), dtype=torch.float32)
        for depth, z in enumerate(logits):
            with torch.set_grad_enabled(torch.is_grad_enabled() and differentiable):
                alpha = acceptance(z, p[depth]).where(valid[:, depth], 0.0)
            alphas.append(alpha)
            if self.name != "e2e-tv":
                losses = _one(self.name, z, p[depth], tokens[depth], alpha)
                total = total + losses.where(valid[:, depth], 0.0).sum() * weights[depth]
        stacked = torch.stack(alphas, -1)
        if self.name == "e2e-tv":
            # A text that ends within the draft has nothing to lose behind its end.
            total = (valid.float().mean(-1) - expected_accepted(stacked)).sum() / counts[0].clamp_min(1)
        return total, stacked.detach()


def _one(name: str, logits: Tensor, p: Tensor, tokens: Tensor, alpha: Tensor) -> Tensor:
    """Loss [N] of one depth."""
    if name == "ce":
        return F.cross_entropy(logits.float(), tokens, reduction="none")
    if name == "kl":
        return kl_divergence(logits, p)
    if name == "lk-alpha":
        return -alpha.clamp_min(FLOOR).log()
    if name == "lk-lambda":
        weight = (-ETA * alpha.detach()).exp()
        return weight * kl_divergence(logits, p) + (1 - weight) * (1 - alpha)
    return 1 - alpha
