"""Real processes that train together over gloo, as torchrun starts them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    return os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(script: str, ranks: int, *arguments: str) -> list[dict]:
    """Run a script in `ranks` processes; what each printed last, a JSON object."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments], cwd=ROOT, env=environment(rank, ranks, port),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        finished = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(err for _, err in finished)
    return [json.loads(out.splitlines()[-1]) for out, _ in finished]
