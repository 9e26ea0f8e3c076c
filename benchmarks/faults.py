"""Faults on purpose: kills, bad networks, mutated messages, full disks, a soak; audits what is left after each.

rollahead bench faults                   every part, short: under a minute
rollahead bench faults --minutes 60      every failpoint twice and 200 random kills, 1,000,000 mutated messages,
                                         every fault of a network, half of the time soaking
rollahead bench faults --part kills --minutes 10
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.fault_disk import disk_full
from benchmarks.fault_fuzz import fuzz
from benchmarks.fault_kills import KILLED_AT, kill_matrix
from benchmarks.fault_network import BYTE_FAULTS, MESSAGE_FAULTS, network_faults
from benchmarks.fault_soak import soak
from benchmarks.options import SEED, Parser, minutes
from benchmarks.results import write_results

PARTS = ("kills", "disk", "network", "fuzz", "soak")
SHORT_FAILPOINTS = (
    "lease.recorded", "spool.torn", "journal.torn", "journal.fsync", "ack.sent", "publish.written",
    "checkpoint.renamed",
)  # fmt: skip
SHORT_NETWORK = ("drop", "corrupt", "half-open", "half-open-kept", "all")


def main(arguments: list[str]) -> int:
    """Runs the parts, prints a line each, writes `results.json`; 1 when something was lost, repeated or broken."""
    parser = Parser(prog="rollahead bench faults", description="Faults on purpose, and an audit.")
    parser.add_argument("--minutes", type=minutes, default=0.0, help="long form, about this long; 0: the short form")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-faults"), help="folder for results.json")
    parser.add_argument("--seed", type=SEED, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # processes are forked from this one
    chosen = [part for part in PARTS if part in (options.part or PARTS)]
    rows, failed = [], False
    with tempfile.TemporaryDirectory(prefix="rollahead-faults-") as folder:
        for part in chosen:
            seconds = _share(part, options.minutes * 60, chosen)
            began = time.monotonic()
            (Path(folder) / part).mkdir()
            found = _RUN[part](Path(folder) / part, seconds, options.seed)
            problems = found["problems"]
            failed |= bool(problems)
            rows.append({"part": part, "wall_seconds": time.monotonic() - began, **found})
            print(f"{part:<8} {rows[-1]['wall_seconds']:6.1f} s  {_summary(part, found)}  {problems or 'nothing lost'}")
    path = write_results(options.out, "faults", rows, seed=options.seed, minutes=options.minutes)
    print(f"written {path}")
    return int(failed)


def _share(part: str, seconds: float, chosen: list[str]) -> float:
    """Of the time: half for the soak, where there are others too."""
    if "soak" not in chosen or len(chosen) == 1:
        return seconds / len(chosen)
    return seconds / 2 if part == "soak" else seconds / 2 / (len(chosen) - 1)


def _kills(root: Path, seconds: float, seed: int) -> dict[str, Any]:
    long = seconds > 0
    return kill_matrix(
        root, names=KILLED_AT * 2 if long else SHORT_FAILPOINTS, random_kills=200 if long else 4, seed=seed,
        deadline=time.monotonic() + (seconds or 150),
    )  # fmt: skip


def _network(root: Path, seconds: float, seed: int) -> dict[str, Any]:
    faults = (*BYTE_FAULTS, *MESSAGE_FAULTS) if seconds else SHORT_NETWORK
    return network_faults(root, seconds=max(1.0, seconds / 2 / len(faults)), seed=seed, faults=faults)


def _fuzz(root: Path, seconds: float, seed: int) -> dict[str, Any]:
    return fuzz(root, count=1_000_000 if seconds else 20_000, seconds=max(2.0, seconds / 3), seed=seed)


def _soak(root: Path, seconds: float, seed: int) -> dict[str, Any]:
    return soak(root, seconds=seconds or 8.0, restart_seconds=20.0 if seconds else 2.0, seed=seed)


_RUN: dict[str, Callable[[Path, float, int], dict[str, Any]]] = {
    "kills": _kills, "disk": lambda root, seconds, seed: disk_full(root, thorough=seconds > 0), "network": _network,
    "fuzz": _fuzz, "soak": _soak,
}  # fmt: skip


def _summary(part: str, found: dict[str, Any]) -> str:
    match part:
        case "kills":
            left = f", {len(found['failpoints_left'])} failpoints left" if found["failpoints_left"] else ""
            return f"{found['kills']} kills ({found['kills_at_random']} at random) in {found['runs']} runs{left}"
        case "disk":
            skipped = found["tmpfs"].get("skipped")
            tried = f"NOT TRIED on a full tmpfs ({skipped})" if skipped else "full tmpfs: waited for space"
            return f"{tried}; {len(found['writers'])} writers"
        case "network":
            worst = max((row["recovery_seconds"] for row in found["rows"]), default=0.0)
            return f"{len(found['rows'])} faults, slowest recovery {worst:.1f} s"
        case "fuzz":
            return f"{found['mutated']} messages, memory {found['memory_growth_bytes'] / 2**20:+.1f} MiB"
        case _:
            growth = ", ".join(f"{name} {share:+.1%}" for name, share in found["memory_growth"].items())
            return f"{found['steps']} steps, {found['engine_restarts']} restarts, memory {growth}"
