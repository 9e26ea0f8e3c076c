"""Importance ratios and what is measured on them. Float32, in log space."""

import torch

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to +-20 before `exp`: e^20 is far outside every band and still finite."""


def log_ratio(logp: torch.Tensor, logp_reference: torch.Tensor) -> torch.Tensor:
    """log(pi / pi_reference) of each token, within +-20, from log-probs in nats of any equal shape."""
    return (_wide(logp) - _wide(logp_reference)).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def importance_ratio(logp: torch.Tensor, logp_reference: torch.Tensor) -> torch.Tensor:
    """pi / pi_reference of each token, from log-probs in nats of any equal shape."""
    return log_ratio(logp, logp_reference).exp()


def unit_ratio(logp: torch.Tensor) -> torch.Tensor:
    """pi / sg(pi): value 1, with the gradient of log pi."""
    return (logp - logp.detach()).exp()


def finite_or_zero(weight: torch.Tensor) -> torch.Tensor:
    """The weights with NaN and infinities replaced by 0: a token without a usable weight is not trained."""
    return torch.where(weight.isfinite(), weight, torch.zeros_like(weight))


def k3(logp: torch.Tensor, logp_reference: torch.Tensor) -> torch.Tensor:
    """The k3 estimate of KL(reference || pi), rho - 1 - log rho with rho = pi / reference, per token sampled from the
    reference (Schulman 2020, "Approximating KL divergence"). Non-negative; nats."""
    difference = log_ratio(logp, logp_reference)
    return torch.expm1(difference) - difference


def effective_sample_fraction(weight: torch.Tensor) -> float:
    """Effective sample size over n: (sum w)^2 / (n sum w^2), in (0, 1]; 0 where all weights are 0."""
    weight = weight.double()
    squares = float((weight * weight).sum())
    return float(weight.sum()) ** 2 / (weight.numel() * squares) if squares > 0 else 0.0


def _wide(values: torch.Tensor) -> torch.Tensor:
    """At least float32: half precision would lose ratios near 1."""
    return values if values.dtype == torch.float64 else values.float()
