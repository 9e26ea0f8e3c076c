"""SplitMix64's output function over arrays, compiled; `pipeline.sampling.uniforms` says what for."""

import numpy as np
from numba import njit, vectorize

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@njit(inline="always")
def _mix(x: np.uint64) -> np.uint64:
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))


@njit(inline="always")
def one_uniform(seed: np.uint64, position: np.uint64, offset: np.uint64) -> float:
    """For other compiled functions; `uniform` is the same over arrays."""
    # Hashed twice: with one hash, seeds a multiple of the increment apart would be one stream shifted.
    bits = _mix(_mix(_mix(seed + offset) ^ _INCREMENT) + position * _INCREMENT)
    # 52 bits and a half keep the largest value below 1 after rounding, and the smallest above 0.
    return float((np.float64(bits >> np.uint64(12)) + 0.5) * 2.0**-52)


@njit(inline="always")
def one_salted_seed(seed: np.uint64, salt: np.uint64) -> np.uint64:
    return seed if salt == 0 else _mix(_mix(seed ^ _FIRST) + salt * _SECOND) >> np.uint64(1)


@vectorize(["float64(uint64, uint64, uint64)"], cache=True)
def uniform(seed: np.uint64, position: np.uint64, offset: np.uint64) -> float:
    return one_uniform(seed, position, offset)


@vectorize(["uint64(uint64, uint64)"], cache=True)
def salted_seed(seed: np.uint64, salt: np.uint64) -> np.uint64:
    return one_salted_seed(seed, salt)
