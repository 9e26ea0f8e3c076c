"""The compiled kernels against the same formulas in torch, float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.models import cpu_kernels
from pipeline.models.kv_cache import PAGE
from pipeline.models.openmp import team

KINDS = {"float32": (torch.float32, 3e-6), "bfloat16": (torch.bfloat16, 2e-2)}


def array(x):
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Pages:
    """Random keys and values of ragged sequences, in shuffled pages; what no sequence has written is enormous."""

    def __init__(self, kind, heads, kv_heads, dimension, cached, counts):
        rng = torch.Generator().manual_seed(1)
        self.dtype, self.tolerance = KINDS[kind]
        self.cached, counts = np.array(cached), np.array(counts)
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        lengths = self.cached + counts
        most = -(-int(lengths.max()) // PAGE)
        self.tables = np.random.default_rng(2).permutation(len(cached) * most).reshape(len(cached), most)
        shape = (self.tables.size, kv_heads, PAGE, dimension)
        self.keys, self.values = (torch.randn(shape, generator=rng).to(self.dtype) for _ in range(2))
        for b, length in enumerate(lengths):
            for at in range(length, most * PAGE):
                self.keys[self.tables[b, at // PAGE], :, at % PAGE] = 1e4
                self.values[self.tables[b, at // PAGE], :, at % PAGE] = 1e4
        self.queries = torch.randn(int(counts.sum()), heads, dimension, generator=rng).to(self.dtype)

    def attend(self, window=1 << 40, parallel=False):
        out = torch.full_like(self.queries, 7.0)
        arguments = (
            array(self.queries), array(self.keys.mT.contiguous()), array(self.values), self.tables, self.cached,
            self.starts, window, self.queries.shape[-1] ** -0.5, array(out),
        )  # fmt: skip
        if parallel:
            cpu_kernels.attend_in_parallel(*arguments)
        else:
            number = np.zeros(1, np.int64)
            cpu_kernels.attend(*arguments, number.ctypes.data)
        return out

    def expected(self, window=1 << 40):
        parts = []
        for b, begin in enumerate(self.starts[:-1]):
            queries = self.queries[begin : self.starts[b + 1]].double().transpose(0, 1)
            length = self.cached[b] + queries.shape[1]
            keys, values = (
                x[self.tables[b]].transpose(0, 1).flatten(1, 2)[:, :length].double().repeat_interleave(
                    queries.shape[0] // x.shape[1], 0
                )
                for x in (self.keys, self.values)
            )  # fmt: skip
            newest = torch.arange(self.cached[b], length)[:, None]
            at = torch.arange(length)
            seen = (at <= newest) & (at > newest - window)
            parts.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen).transpose(0, 1))
        return torch.cat(parts)


SHAPES = [
    (6, 2, 64, [200, 0, 31, 32, 95], [1, 3, 1, 5, 2]),
    (5, 5, 48, [7, 40], [1, 1]),
    (14, 2, 80, [70, 3], [2, 1]),
    (3, 1, 16, [0], [8]),
    (6, 2, 64, [100, 0, 31, 5], [1, 70, 17, 33]),
]


@pytest.mark.parametrize("shape", SHAPES, ids=["grouped", "odd", "seven", "from nothing", "drafts and prompts"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [1 << 40, 33, 1])
def test_attention_over_pages_equals_torchs(kind, shape, window):
    pages = Pages(kind, *shape)
    assert (pages.attend(window).double() - pages.expected(window)).abs().max() < pages.tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_the_work_and_change_nothing(kind, two_threads):
    assert team() is not None, "torch's wheels for Linux come with GNU OpenMP"
    for shape in SHAPES:
        pages = Pages(kind, *shape)
        assert torch.equal(pages.attend(parallel=True), pages.attend())


@pytest.mark.parametrize("kind", KINDS)
def test_rms_norm_equals_torchs(kind):
    dtype, tolerance = KINDS[kind]
    x = (3 * torch.randn(5, 48)).to(dtype)
    weight = torch.randn(48)
    out = torch.empty_like(x)
    cpu_kernels.rms_norm(array(x), weight.numpy(), 1e-6, array(out))
    expected = F.rms_norm(x.double(), (48,), weight.double(), 1e-6)
    assert ((out.double() - expected).abs() / (1 + expected.abs())).max() < tolerance


def test_exponential_is_accurate_to_float32():
    from numba import njit

    @njit
    def each(x, out):
        for i in range(len(x)):
            out[i] = cpu_kernels.exponential(x[i])

    x = -np.logspace(-6, np.log10(87), 4000).astype(np.float32)
    out = np.empty_like(x)
    each(x, out)
    assert np.abs(out / np.exp(x.astype(np.float64)) - 1).max() < 3e-7
