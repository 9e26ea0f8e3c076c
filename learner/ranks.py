"""The one seam through which statistics become global: over all ranks when torch.distributed runs, else over this one.

Mini-batches are divided over ranks by whole samples. A piece whose statistic is declared global computes it on what
these functions return; as it sees its whole mini-batch at once, micro-batches do not enter either.
"""

import torch
from torch import distributed


def world_size() -> int:
    """Ranks that share a batch."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def summed(value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor of one shape over all ranks, on each of them."""
    if world_size() == 1:
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total


def gathered(values: torch.Tensor) -> torch.Tensor:
    """All ranks' rows [n_r, ...] one after another [sum n_r, ...], on each of them; the number of rows may differ."""
    if world_size() == 1:
        return values
    count = torch.tensor([len(values)], device=values.device)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    distributed.all_gather(counts, count)
    longest = int(torch.cat(counts).max())
    padded = values.new_zeros(longest, *values.shape[1:])
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])
