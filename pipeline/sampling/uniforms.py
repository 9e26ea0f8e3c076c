"""Counter-based uniforms: a sample's randomness is a function of its seed and the token's position, of nothing else.

Neither the sequences that share the batch, nor what was drafted, nor a restart changes the numbers a token meets.
The generator is SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): its output function applied to key + counter * increment,
the key being a hash of seed and stream.
"""

from enum import IntEnum

import numpy as np

_INCREMENT = 0x9E3779B97F4A7C15


class Stream(IntEnum):
    """Decisions about one token that must not share a random number."""

    SAMPLE = 0
    """draw from the target"""
    ACCEPT = 1
    """acceptance of a draft token that was itself sampled"""
    RESIDUAL = 2
    """draw after such a draft was rejected"""
    BLOCK = 3
    """acceptance by block verification, which looks at numbers of positions that it then leaves open"""
    DRAFT = 4
    """draw of a draft token; counted from where its draft starts"""


def stream_offset(stream: Stream) -> np.uint64:
    """What the numbers of a stream are told apart by."""
    return np.uint64((stream + 1) * _INCREMENT % 2**64)


def uniforms(seeds: np.ndarray, positions: np.ndarray, stream: Stream) -> np.ndarray:
    """float64 in the open interval (0, 1), of the broadcast shape of integer `seeds` and `positions`."""
    from pipeline.sampling.splitmix import uniform  # numba: not for whoever imports this module for its types

    offset = stream_offset(stream)
    found: np.ndarray = uniform(np.atleast_1d(seeds).astype(np.uint64), np.asarray(positions).astype(np.uint64), offset)
    return found


def salted(seeds: np.ndarray, salts: np.ndarray) -> np.ndarray:
    """A seed of its own [N] for each pair of `seeds` [N] and positive `salts` [N]; a salt of 0 leaves the seed.

    A drafter that remembers what a seed led to, and then draws drafts from a distribution that it made of that, would
    state a distribution that is not independent of the numbers it is tested with. Salted seeds meet new numbers.
    """
    from pipeline.sampling.splitmix import salted_seed

    found: np.ndarray = salted_seed(seeds.astype(np.uint64), salts.astype(np.uint64))
    return found.astype(np.int64)
