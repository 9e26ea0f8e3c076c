"""Sums and means over the tokens of each sample, and random numbers that belong to a token."""

import torch

_FIRST, _SECOND, _THIRD = -7046029254386353131, -4658895280553007687, -7723592293110705685
"""Multipliers of splitmix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", section 5,
with Stafford's mix 13), as signed integers."""


def sequence_sum(values: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """For each of T tokens the sum over its sample's tokens; [T], differentiable."""
    ids, inverse = sequence.unique(return_inverse=True)
    return values.new_zeros(len(ids)).index_add(0, inverse, values)[inverse]


def sequence_length(sequence: torch.Tensor) -> torch.Tensor:
    """For each of T tokens the number of tokens of its sample; int64 [T]."""
    _, inverse, counts = sequence.unique(return_inverse=True, return_counts=True)
    return counts[inverse]


def sequence_mean(values: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """For each of T tokens the mean over its sample's tokens; [T], differentiable."""
    return sequence_sum(values, sequence) / sequence_length(sequence)


def sequence_any(flags: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """For each of T tokens whether a token of its sample is flagged; bool [T]."""
    return sequence_sum(flags.float(), sequence) > 0


def sequence_quantile(values: torch.Tensor, sequence: torch.Tensor, q: float) -> torch.Tensor:
    """For each of T tokens the q quantile (linear interpolation) of its sample's values; [T]."""
    ids, inverse = sequence.unique(return_inverse=True)
    if not len(ids):
        return values
    return torch.stack([quantile(values[inverse == index], q) for index in range(len(ids))])[inverse]


def quantile(values: torch.Tensor, q: float) -> torch.Tensor:
    """The q quantile with linear interpolation, of any number of values (`torch.quantile` takes at most 2^24)."""
    ordered = values.sort().values
    position = q * (len(ordered) - 1)
    lower = int(position)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (ordered[upper] - ordered[lower]) * (position - lower)


def positions(sequence: torch.Tensor) -> torch.Tensor:
    """For each of T tokens its number among its sample's trained tokens, from 0; int64 [T].

    Tokens of a sample must be next to each other.
    """
    if not len(sequence):
        return sequence
    index = torch.arange(len(sequence), device=sequence.device)
    starts = torch.cat([sequence.new_ones(1, dtype=torch.bool), sequence[1:] != sequence[:-1]])
    return index - index.where(starts, 0).cummax(0).values


def token_uniforms(seed: int, step: int, sequence: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """float64 [T] in [0, 1), the same for a token wherever it is packed."""
    key = _mix(torch.full_like(sequence, _signed(seed)) + _FIRST)
    for value in (torch.full_like(sequence, _signed(step)), sequence, position):
        key = _mix((key ^ value) + _FIRST)
    return ((key >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def _signed(value: int) -> int:
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shifted(x, 30)) * _SECOND
    x = (x ^ _shifted(x, 27)) * _THIRD
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
