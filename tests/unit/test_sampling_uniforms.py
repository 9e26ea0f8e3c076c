import numpy as np
import pytest
from scipy import stats

from pipeline.sampling.uniforms import Stream, uniforms

N = 100_000


def scalar_uniform(seed, position, stream):
    """The definition with Python integers: SplitMix64 keyed by seed and stream."""
    mask = (1 << 64) - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    increment = 0x9E3779B97F4A7C15
    key = mix(mix((seed + (stream + 1) * increment) & mask) ^ increment)
    return ((mix((key + position * increment) & mask) >> 12) + 0.5) / 2**52


def test_values_follow_the_definition():
    seeds, positions = np.array([0, 1, 5, (1 << 62) - 1]), np.array([0, 1, 1000, 123_456])
    for stream in Stream:
        values = uniforms(seeds[:, None], positions[None, :], stream)
        expected = [[scalar_uniform(int(s), int(p), int(stream)) for p in positions] for s in seeds]
        assert values.dtype == np.float64
        assert values.tolist() == expected


@pytest.mark.parametrize("stream", Stream)
def test_uniform_over_positions_and_over_seeds(stream):
    for values in (uniforms(np.array([3]), np.arange(N), stream), uniforms(np.arange(N), np.array([7]), stream)):
        assert values.min() > 0 and values.max() < 1
        counts = np.histogram(values, bins=200, range=(0, 1))[0]
        assert stats.chisquare(counts).pvalue > 1e-4
        assert stats.kstest(values, "uniform").pvalue > 1e-4


def pairs():
    base = uniforms(np.array([11]), np.arange(N), Stream.SAMPLE)
    yield "next position", base[:-1], base[1:]
    yield "next seed", base, uniforms(np.array([12]), np.arange(N), Stream.SAMPLE)
    yield "accept", base, uniforms(np.array([11]), np.arange(N), Stream.ACCEPT)
    yield "residual", base, uniforms(np.array([11]), np.arange(N), Stream.RESIDUAL)
    yield "next seed, same position", *(uniforms(np.arange(N) + k, np.array([5]), Stream.SAMPLE) for k in (0, 1))


def test_neighbouring_positions_seeds_and_streams_are_independent():
    for name, x, y in pairs():
        table = np.histogram2d(x, y, bins=16, range=[[0, 1], [0, 1]])[0]
        assert stats.chisquare(table.ravel()).pvalue > 1e-4, name
