"""Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864), in the half-split layout of Hugging Face."""

import math

import numpy as np
import torch
from torch import Tensor

from pipeline.models.config import RopeParameters


def inverse_frequencies(rope: RopeParameters, head_dim: int) -> Tensor:
    """float32 [head_dim / 2], radians a position, slow-rotating dimensions stretched where the model asks for it."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: Tensor, rope: RopeParameters) -> Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, a linear blend between."""
    turns = rope.original_max_positions * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


class RopeTable:
    """Cosines and signed sines by position, extended as longer positions are asked for."""

    def __init__(self, rope: RopeParameters, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim)
        self._dtype, self._device = dtype, device
        self._cos = self._sin = torch.empty(0, head_dim, dtype=dtype, device=device)
        self._halves = (np.empty((0, 0), np.float32), np.empty((0, 0), np.float32))

    def at(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, 1, head_dim] at `positions` [N], all below `length`."""
        if length > len(self._cos):
            self._extend(length)
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)

    def halves(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines float32 [at least `length`, head_dim / 2] of all positions, unsigned; for a CPU table."""
        if length > len(self._halves[0]):
            length = -(-length // 256) * 256
            angles = torch.outer(torch.arange(length, dtype=torch.float32), self._frequencies)
            self._halves = (angles.cos().numpy(), angles.sin().numpy())
        return self._halves

    def _extend(self, length: int) -> None:
        length = -(-length // 256) * 256
        angles = torch.outer(torch.arange(length, dtype=torch.float32), self._frequencies)
        cos, sin = angles.cos(), angles.sin()
        # rotate_half(x) = [-x2, x1]; the sign sits in the table so that rotation is a swap and two multiplications.
        self._cos = torch.cat([cos, cos], -1).to(self._dtype).to(self._device)
        self._sin = torch.cat([-sin, sin], -1).to(self._dtype).to(self._device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [N, heads, head_dim] turned by its positions' angles."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)
