"""Starts real `rollahead` processes and reads what they leave behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(cache: Path) -> dict[str, str]:
    """Of a user who has nothing yet, except that reward functions of the tests can be imported."""
    return os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def settings(**options: object) -> list[str]:
    """`--set` arguments; double underscores stand for the dot."""
    return [text for key, value in options.items() for text in ("--set", f"{key.replace('__', '.')}={value}")]


def rollahead(*arguments: str, cache: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def start(*arguments: str, cache: Path, log: Path) -> subprocess.Popen:
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", *arguments], env=environment(cache), stdout=file, stderr=file
        )


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def rows(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def trained(run: Path) -> list[tuple[int, int]]:
    """(lease, sample) ids in the order they were trained on."""
    lines = (run / "trained.jsonl").read_text().splitlines()
    return [tuple(sample) for line in lines for sample in json.loads(line)["samples"]]


def wait_until(condition: Callable[[], bool], seconds: float, what: str, *processes: subprocess.Popen) -> None:
    """Fails at once when one of `processes` has ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        for process in processes:
            assert process.poll() is None, f"a process ended with {process.returncode} while waiting for {what}"
        assert time.monotonic() < deadline, f"no {what} within {seconds:.0f} s"
        time.sleep(0.05)


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
