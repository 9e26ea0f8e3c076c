"""From logits to log-probs, entropy and a draw. Computed in float32, in float64 where the logits are float64."""

import torch
from torch import Tensor

_BLOCK = 256


def log_probabilities(logits: Tensor, temperatures: Tensor | None = None) -> Tensor:
    """Log-softmax [N, V] of logits [N, V] at each row's temperature [N]; a temperature of 0 (greedy), or None, is 1."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if temperatures is not None:
        divisor = torch.where(temperatures > 0, temperatures, 1.0).to(wide.dtype)
        wide = wide / divisor.unsqueeze(-1)
    return torch.log_softmax(wide, dim=-1)


def entropy(probabilities: Tensor, logprobs: Tensor) -> Tensor:
    """Nats [N] of full-vocabulary distributions [N, V], given with their logarithms."""
    # Summed as -p log p, all terms of one sign; the clamp makes 0 * -inf the 0 that it stands for.
    return -(probabilities * logprobs.clamp_min(torch.finfo(logprobs.dtype).min)).sum(dim=-1)


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The token [N] at which the running sum of non-negative `weights` [N, V] passes `uniform` [N] of their total.

    Sums are float64: a token comes out with its share of the total to about 2^-52, one of weight 0 never.
    """
    vocabulary = weights.shape[-1]
    if vocabulary <= 2 * _BLOCK:
        running = weights.cumsum(dim=-1, dtype=torch.float64)
        return _first_past(running, uniform * running[:, -1])
    # In two stages, block and then token: a running sum over a whole vocabulary costs more than a model's softmax.
    whole = vocabulary // _BLOCK
    sums = weights[:, : whole * _BLOCK].unflatten(1, (whole, _BLOCK)).sum(-1, dtype=torch.float64)
    if vocabulary % _BLOCK:
        rest = weights[:, whole * _BLOCK :].sum(-1, keepdim=True, dtype=torch.float64)
        sums = torch.cat([sums, rest], dim=1)
    running = sums.cumsum(-1)
    wanted = uniform * running[:, -1]
    block = _first_past(running, wanted)
    # The difference to the sum before the block: negative by rounding at most, which then means its first token.
    before = torch.nn.functional.pad(running, (1, 0)).gather(1, block.unsqueeze(1)).squeeze(1)
    column = block.unsqueeze(1) * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, column.clamp_max(vocabulary - 1)).masked_fill(column >= vocabulary, 0)
    token = _first_past(inside.cumsum(-1, dtype=torch.float64), (wanted - before).clamp_min(0))
    return (block * _BLOCK + token).clamp_max(vocabulary - 1)


def _first_past(running: Tensor, wanted: Tensor) -> Tensor:
    """First column [N] at which the running sums [N, M] pass `wanted` [N]."""
    total = running[:, -1:].contiguous()
    column = torch.searchsorted(running, wanted.unsqueeze(-1), right=True)
    # `wanted` may round up to the total; the last column of positive weight is where the total is first reached.
    # The clamp matters only for weights that are not numbers: some token comes out, and its log-prob tells.
    return torch.minimum(column, torch.searchsorted(running, total)).squeeze(-1).clamp_max(running.shape[-1] - 1)
