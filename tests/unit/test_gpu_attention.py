"""What the kernel for a GPU is handed: without one, the kernel itself is replaced by attention written out from torch's
documentation of it."""

import pytest
import torch
from torch import nn
from torch.nn.attention import varlen

from learner import attention, gpu_attention


def written_out(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """`torch.nn.attention.varlen.varlen_attn` on [T, H, D], head by head and query by query."""
    assert cu_q.dtype == torch.int32 and max_q == max_k == int(cu_q.diff().max())
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16 and query.is_contiguous()
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    assert right == 0
    out = torch.empty_like(query, dtype=torch.float32)
    share = query.shape[1] // key.shape[1]
    for start, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        for at in range(start, end):
            seen = slice(start if left < 0 else max(start, at - left), at + 1)
            for head in range(query.shape[1]):
                scores = key[seen, head // share].float() @ query[at, head].float() * (scale or query.shape[2] ** -0.5)
                out[at, head] = scores.softmax(0) @ value[seen, head // share].float()
    return out.to(query.dtype)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_one_call_of_the_kernel_is_every_segments_attention(monkeypatch, window, scaling):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 11, 8, generator=generator).bfloat16() for heads in (4, 2, 2))
    arguments = attention.segment_arguments(torch.tensor([0, 7, 11], dtype=torch.int32), device=torch.device("cpu"))
    options = {"scaling": scaling, "sliding_window": window, **arguments}
    expected, _ = attention.packed_sdpa(nn.Module(), q.float(), k.float(), v.float(), None, **options)
    monkeypatch.setattr(varlen, "varlen_attn", written_out)
    monkeypatch.setattr(attention, "varlen_runs", lambda query: True)
    found, _ = attention.packed_sdpa(nn.Module(), q, k, v, None, **options)
    assert found.shape == expected.shape and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


def test_a_cpu_and_float32_keep_one_call_a_segment():
    assert not gpu_attention.varlen_runs(torch.zeros(1, 2, 5, 8, dtype=torch.bfloat16))
    on_meta = torch.zeros(1, 2, 5, 8, device="meta")
    assert not gpu_attention.varlen_runs(on_meta)


def test_the_kernel_takes_the_arguments_that_it_is_given():
    """Where torch changes them, this fails here and not on somebody's GPU."""
    import inspect

    parameters = inspect.signature(varlen.varlen_attn).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size", "enable_gqa"} <= parameters.keys()
