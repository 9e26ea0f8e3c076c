"""`rollahead doctor`: what this machine can do for a run, and what to set. Measures for a few seconds."""

import importlib.util
import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.telemetry.environment import cores, cpu_name

MIB = 1 << 20
BUFFER_BYTES = 256 * MIB
"""larger than caches"""
PRODUCT = 1024
"""side of the matrices that are multiplied"""


@dataclass(frozen=True)
class Finding:
    name: str
    value: str
    advice: str = ""
    """what to set; empty where nothing is to be done"""


def doctor() -> int:
    """Print what was found and what to do; returns the exit code, 0 whatever was found."""
    findings = [finding for check in CHECKS for finding in check()]
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.name:<{width}}  {finding.value}")
        if finding.advice:
            print(f"{'':<{width}}  -> {finding.advice}")
    return 0


def check_processor() -> list[Finding]:
    """Name, cores, vector units."""
    flags = _flags()
    units = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile") if name in flags]
    found = [Finding("processor", f"{cpu_name()}, {cores()} cores", _few_cores())]
    return [*found, Finding("vector units", ", ".join(units) or "none of those that matter")]


def check_threads() -> list[Finding]:
    """Threads of torch, and settings of the environment that change them."""
    import torch

    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
    said = {name: os.environ[name] for name in names if name in os.environ}
    threads = torch.get_num_threads()
    advice = ""
    if threads > cores():
        advice = f"torch has more threads than cores; unset OMP_NUM_THREADS, or set it to {cores()}"
    text = f"torch uses {threads}" + (f"; {', '.join(f'{k}={v}' for k, v in said.items())}" if said else "")
    return [Finding("threads", text, advice)]


def check_types() -> list[Finding]:
    """Which type multiplies faster on this processor."""
    import torch

    def speed(dtype: torch.dtype) -> float:
        matrix = torch.randn(PRODUCT, PRODUCT).to(dtype)
        return 2 * PRODUCT**3 / _best(lambda: matrix @ matrix) / 1e9

    single, half = speed(torch.float32), speed(torch.bfloat16)
    ratio = half / single
    text = f"float32 {single:.0f} GFLOP/s, bfloat16 {half:.0f} GFLOP/s ({ratio:.1f} times)"
    faster = 'set engine.dtype = "bfloat16" and learner.dtype = "bfloat16"; watch mismatch_k3'
    slower = 'keep learner.dtype = "float32"; engine.dtype = "bfloat16" still halves the memory that decoding reads'
    return [Finding("matrix products", text, faster if ratio > 1.3 else slower if ratio < 0.9 else "")]


def check_bandwidth() -> list[Finding]:
    """Bytes a second that are read: what bounds decoding at small batches."""
    import torch

    buffer = torch.ones(BUFFER_BYTES // 4)
    seconds = _best(lambda: buffer.sum())
    rate = BUFFER_BYTES / seconds
    text = f"{rate / 1e9:.1f} GB/s read: a model of 1 GB decodes at most {rate / 1e9:.0f} tokens/s a sequence"
    return [Finding("memory bandwidth", text)]


def check_memory() -> list[Finding]:
    """Main memory, and how large a model can be trained in it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _meminfo().get("MemAvailable", total)
    # float32 weights, gradients and two moments; the engine's copy beside them
    parameters = free / 20
    text = f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free: weights, gradients and moments of "
    text += f"{parameters / 1e9:.2f}B parameters, without activations"
    return [Finding("memory", text, "close other programs" if free < 2 * 2**30 else "")]


def check_accelerators() -> list[Finding]:
    """CUDA devices."""
    import torch

    if not torch.cuda.is_available():
        return [Finding("CUDA", "no device", "runs are on the CPU; small models, and synchronous or taking turns")]
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        text = f"{torch.cuda.get_device_name(index)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        found.append(Finding(f"cuda:{index}", text))
    if len(found) > 1:
        advice = 'give engine and learner devices of their own: engine.device = "cuda:1", learner.device = "cuda:0"'
        found.append(Finding("CUDA", f"{len(found)} devices", advice))
    return found


def check_packages() -> list[Finding]:
    """Extras, by what they are for."""
    extras = {"datasets": "Hugging Face datasets", "wandb": "Weights & Biases"}
    return [_vllm()] + [
        Finding(name, "installed" if importlib.util.find_spec(name) else f"not installed (only for {purpose})")
        for name, purpose in extras.items()
    ]


def _vllm() -> Finding:
    """Installed or not, and whether the vLLM generator drives the version that is."""
    from pipeline.engine.vllm.install import DRIVEN, installed_version, require_vllm
    from pipeline.errors import UsageError

    if importlib.util.find_spec("vllm") is None:
        return Finding("vllm", "not installed (only for generation at scale)")
    found = installed_version() or "unknown"
    try:
        require_vllm()
    except UsageError as error:
        return Finding("vllm", f'{found}, which engine.generator = "vllm" does not drive', str(error))
    return Finding("vllm", f'{found}: fit for engine.generator = "vllm", which drives {DRIVEN}x')


def check_limits() -> list[Finding]:
    """Of the operating system: open files, disk space, shared memory."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    disk = shutil.disk_usage(Path.cwd()).free
    found = [
        Finding("open files", str(files), "ulimit -n 4096" if 0 <= files < 1024 else ""),
        Finding(
            "disk, here", f"{disk / 2**30:.1f} GiB free",
            "checkpoints and published weights need several copies of the model; choose another --out"
            if disk < 5 * 2**30 else "",
        ),
    ]  # fmt: skip
    if Path("/dev/shm").exists():
        found.append(Finding("shared memory", f"{shutil.disk_usage('/dev/shm').free / 2**20:,.0f} MiB free"))
    return found


def check_transport() -> list[Finding]:
    """Whether ZeroMQ can encrypt."""
    import zmq

    curve = zmq.has("curve")
    text = f"ZeroMQ {zmq.zmq_version()}, " + ("CURVE keys" if curve else "no CURVE")
    return [Finding("transport", text, "" if curve else "engines on other machines need a pyzmq with libsodium")]


CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    check_processor, check_threads, check_types, check_bandwidth, check_memory, check_accelerators, check_packages,
    check_limits, check_transport,
)  # fmt: skip


def _few_cores() -> str:
    if cores() > 2:
        return ""
    return "engine and learner share the cores: overlap gains nothing, drafting does; learner.max_staleness = 1 is fine"


def _best(work: Callable[[], object], seconds: float = 0.5) -> float:
    """Least time of a call, of as many as fit into `seconds`, after one to warm up."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def _flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return set()
    lines = (line for line in path.read_text().splitlines() if line.startswith("flags"))
    return set(next(lines, "").partition(":")[2].split())


def _meminfo() -> dict[str, int]:
    path = Path("/proc/meminfo")
    if not path.exists():
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in path.read_text().splitlines()}
