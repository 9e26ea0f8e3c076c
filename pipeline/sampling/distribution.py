"""From logits to log-probs, entropy and a draw. Computed in float32, in float64 where the logits are float64."""

import torch
from torch import Tensor


def log_probabilities(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Log-softmax [N, V] of logits [N, V] at each row's temperature [N]; a temperature of 0 (greedy) reads as 1."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    divisor = torch.where(temperatures > 0, temperatures, 1.0).to(wide.dtype)
    return torch.log_softmax(wide / divisor.unsqueeze(-1), dim=-1)


def entropy(probabilities: Tensor) -> Tensor:
    """Nats [N] of full-vocabulary distributions [N, V]."""
    return torch.special.entr(probabilities).sum(dim=-1)


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The token [N] at which the running sum of non-negative `weights` [N, V] passes `uniform` [N] of their total.

    Sums are float64: a token comes out with its share of the total to 2^-52, one of weight 0 never.
    """
    running = weights.cumsum(dim=-1, dtype=torch.float64)
    total = running[:, -1:].contiguous()
    token = torch.searchsorted(running, uniform.unsqueeze(-1) * total, right=True)
    # uniform * total may round up to the total; the last token of positive weight is where the total is first reached.
    # The clamp matters only for weights that are not numbers: some token comes out, and its log-prob tells.
    return torch.minimum(token, torch.searchsorted(running, total)).squeeze(-1).clamp_max(weights.shape[-1] - 1)
