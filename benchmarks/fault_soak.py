"""Full rate for a long time, with engines that come, leave and are killed, and one restart of the learner.

What must stay as it is: resident memory of the learner, and of the engine that lives through it, from a first look
after a warm-up to the end; the account of samples; the size of spool and journal.
"""

import signal
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.fault_network import audit_synthetic, step_of
from benchmarks.results import resident_bytes
from benchmarks.synthetic import free_address, start_engine, start_learner

TOKENS = 1024
FLAT_WITHIN = 0.05


def soak(root: Path, *, seconds: float, restart_seconds: float, seed: int) -> dict[str, Any]:
    """Run for so long; engines besides the first are killed or told to leave in turns."""
    root.mkdir(parents=True, exist_ok=True)
    address = free_address()

    def learner() -> subprocess.Popen:
        return start_learner(
            root, address=address, steps=10**9, step_seconds=0.0, checkpoint_every=50, response_tokens=TOKENS,
            max_staleness=3, take_seconds=120.0,
        )  # fmt: skip

    def engine() -> subprocess.Popen:
        return start_engine(
            address, root / "spool", sample_seconds=0.0, tokens=TOKENS, limit_bytes=32 << 20, connect_timeout=120.0
        )

    brain, stable, guest = learner(), engine(), engine()
    guests, kills, problems = [], 0, []
    began = time.monotonic()
    restarted = False
    memory: dict[str, list[float]] = {"learner": [], "engine": []}
    due = began + restart_seconds
    first_steps = 0
    try:
        while time.monotonic() - began < seconds:
            time.sleep(0.2)
            for name, process in (("learner", brain), ("engine", stable)):
                if process.poll() is not None:
                    raise RuntimeError(f"the {name} ended with {process.returncode}")
            share = (time.monotonic() - began) / seconds
            if not restarted and share > 0.2:
                brain.kill()
                brain.communicate()
                brain, restarted = learner(), True
                first_steps = step_of(root)
            if restarted and share > 0.4:
                memory["learner"].append(resident_bytes(pid=brain.pid))
                memory["engine"].append(resident_bytes(pid=stable.pid))
            if time.monotonic() > due:
                due += restart_seconds
                kills += 1
                guest.send_signal(signal.SIGKILL if kills % 2 else signal.SIGTERM)
                guests.append(guest)
                guest = engine()
    except RuntimeError as error:
        problems.append(str(error))
    steps = step_of(root)
    brain.terminate()
    for gone in guests:
        gone.communicate()
    problems += audit_synthetic(root, brain, [stable, guest])
    growth = {name: _growth(values) for name, values in memory.items() if len(values) >= 8}
    problems += [f"the {name}'s memory grew by {share:.1%}" for name, share in growth.items() if share > FLAT_WITHIN]
    return {
        "seconds": seconds, "steps": steps, "steps_before_the_restart": first_steps, "engine_restarts": kills,
        "memory_growth": growth, "resident_bytes": {name: max(values, default=0) for name, values in memory.items()},
        "problems": problems,
    }  # fmt: skip


def _growth(values: list[float]) -> float:
    """From the first quarter to the last, as a share."""
    quarter = len(values) // 4
    return statistics.median(values[-quarter:]) / statistics.median(values[:quarter]) - 1
