"""How fast this machine reads memory: the bound on decoding one sequence, which reads every weight for every token."""

import time

import torch


def read_bandwidth(device: str = "cpu", size: int = 256 << 20, repeats: int = 7) -> float:
    """Bytes a second of summing `size` bytes of float32, the best of `repeats`, with torch's threads."""
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    best = 0.0
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        data.sum()
        _wait(device)
        best = max(best, size / (time.perf_counter() - start))
    return best


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
