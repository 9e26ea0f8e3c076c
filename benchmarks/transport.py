"""Trajectories a second from simulated engines to the learner's journal, and what they cost; beside a PUB/SUB stream.

    rollahead bench transport             a few rows, about a minute
    rollahead bench transport --full      1 to 64 engines, 1k to 32k tokens, with and without keys and fsync

Engines are real links with real spools in other processes; the learner is the real hub with its journal. The stream it
is compared with is in `benchmarks.transport_pubsub`.
"""

import argparse
import json
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.options import Parser, at_least, seconds
from benchmarks.results import resident_bytes, spread, write_results
from benchmarks.synthetic import make_hub, make_link, source, trajectory
from benchmarks.transport_pubsub import FIELDS_BYTES, pubsub
from learner.validation import Limits
from pipeline import messages
from pipeline.codec import decode_from_engine, encode_trajectory
from pipeline.engine.link import Drained, Failed, Granted, Revoked
from pipeline.transport.integrity import seal, unseal
from pipeline.transport.keys import keygen, load_engine_keys, load_learner_keys

GROUP = 4
PROCESSES = 2
"""that simulated engines are spread over"""
WARM_SECONDS = 1.0


def main(arguments: list[str]) -> int:
    """Measures, prints a line a row, writes `results.json`."""
    parser = Parser(prog="rollahead bench transport", description="How fast samples travel.")
    parser.add_argument("--full", action="store_true", help="the whole matrix; about a quarter of an hour")
    parser.add_argument("--seconds", type=seconds, default=3.0, help="measured a row")
    parser.add_argument("--repeats", type=at_least(1), default=5, help="of rows that are compared")
    parser.add_argument("--folder", type=Path, help="where spool and journal are written; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-transport"), help="folder for results.json")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.engine:
        return _engine_process(**json.loads(options.engine))
    rows: list[dict[str, Any]] = [_coding(tokens) for tokens in (1024, 8192, 32768)]
    for row in rows:
        print(f"{row['tokens']:>6} tokens: encode + decode {row['microseconds_per_kB']['median']:.2f} us/kB")
    with tempfile.TemporaryDirectory(prefix="rollahead-transport-", dir=options.folder) as folder:
        for number, case in enumerate(_matrix(options.full)):
            rows.append(_stream(Path(folder) / str(number), options.seconds, **case))
            _print(rows[-1])
        rows += _compared(Path(folder), options.seconds, options.repeats)
        rows.append(_stalled_reader(Path(folder) / "stalled"))
        print(f"reader stalled for 2 s: ours lost {rows[-1]['lost']}, PUB/SUB {rows[-1]['pubsub_lost']}")
    print(f"written {write_results(options.out, 'transport', rows)}")
    return 0


def _matrix(full: bool) -> list[dict[str, Any]]:
    if full:
        sizes, engines = (1024, 8192, 32768), (1, 4, 16, 64)
        return [
            {"tokens": t, "engines": n, "curve": c, "fsync": f}
            for t, n, (c, f) in product(sizes, engines, product((False, True), repeat=2))
        ]
    return [
        {"tokens": 8192, "engines": 1, "curve": False, "fsync": False},
        {"tokens": 8192, "engines": 4, "curve": False, "fsync": False},
        {"tokens": 8192, "engines": 4, "curve": True, "fsync": True},
        {"tokens": 1024, "engines": 4, "curve": False, "fsync": True},
    ]


# ---- coding alone ------------------------------------------------------------------------------------------------


def _coding(tokens: int, repeats: int = 7) -> dict[str, Any]:
    """Encode and decode, checks and checksum included, on one core."""
    sample = trajectory(source(0, 0), 0, tokens=tokens)
    size = sum(map(len, encode_trajectory(sample)))
    rounds = max(20, (64 << 20) // size // repeats)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(rounds):
            frames = unseal(seal(encode_trajectory(sample)))
            assert frames is not None
            decode_from_engine(frames)
        times.append((time.perf_counter() - began) / rounds * 1e6 / (size / 1000))
    return {
        "row": "coding", "tokens": tokens, "bytes": size, "bytes_per_token": size / tokens,
        "microseconds_per_kB": spread(times),
    }  # fmt: skip


# ---- ours --------------------------------------------------------------------------------------------------------


class _Arrivals:
    """Looks at every sample as the ledger takes it: how many bytes, how long under way."""

    def __init__(self, hub: Any) -> None:
        self.samples, self.bytes = 0, 0
        self.latencies: deque[float] = deque(maxlen=200_000)
        self._arrive = hub._ledger.arrive
        hub._ledger.arrive = self

    def __call__(self, sample: messages.Trajectory) -> Any:
        self.samples += 1
        self.bytes += sample.header.response_tokens * FIELDS_BYTES
        self.latencies.append(time.monotonic() - sample.header.reward_parts["submitted"])
        return self._arrive(sample)

    def reset(self) -> None:
        self.samples = self.bytes = 0
        self.latencies.clear()


def _stream(folder: Path, seconds: float, *, tokens: int, engines: int, curve: bool, fsync: bool) -> dict[str, Any]:
    """Simulated engines at full rate into a learner that takes what comes."""
    folder.mkdir()
    keys: dict[str, Any] = {}
    if curve:
        keygen(folder / "keys", ["engine"])
        keys = {"keys": load_learner_keys(folder / "keys")}
    batch = 64
    hub = make_hub(
        folder / "journal", on_event=lambda line: None, heartbeat_seconds=0.5, lease_seconds=30.0, fsync=fsync,
        limits=Limits(prompt_tokens=16, response_tokens=tokens, vocab_size=1000),
        ledger={"batch_size": batch, "group_size": GROUP, "max_staleness": max(4, engines)},
        sockets=keys | {"heartbeat_seconds": 0.5},
    )  # fmt: skip
    hub.restore(None)
    arrivals = _Arrivals(hub)
    hub.start()
    hub.publish(0)
    processes = [
        _start(address=hub.address, folder=str(folder), tokens=tokens, engines=count, fsync=fsync,
               keys=str(folder / "keys") if curve else "")
        for count in _shares(engines, PROCESSES)
    ]  # fmt: skip
    try:
        _serve(hub, batch, WARM_SECONDS)
        arrivals.reset()
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        _serve(hub, batch, seconds)
        took = time.monotonic() - began
        after = resource.getrusage(resource.RUSAGE_SELF)
        samples, size, latencies = arrivals.samples, arrivals.bytes, np.array(arrivals.latencies)
        peak = resident_bytes()
    finally:
        reports = _finish(hub, processes)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    sent = sum(report["samples"] for report in reports)
    p50, p95, p99 = (float(value) for value in np.percentile(latencies, (50, 95, 99)))
    return {
        "row": "stream", "system": "rollahead", "tokens": tokens, "engines": engines, "curve": curve, "fsync": fsync,
        "trajectories_per_second": samples / took, "MB_per_second": size / took / 1e6,
        "latency_seconds": {"p50": p50, "p95": p95, "p99": p99},
        "learner_cpu_share": cpu / took,
        "engine_cpu_microseconds_per_trajectory": sum(r["cpu_seconds"] for r in reports) / max(1, sent) * 1e6,
        "learner_resident_bytes": peak,
    }  # fmt: skip


def _serve(hub: Any, batch: int, seconds: float, wait: float = 20.0) -> None:
    """A learner whose training takes no time: it takes batches and publishes."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        taken = hub.take(batch // GROUP, ordered=False, timeout=wait)
        assert taken is not None, f"no batch in {wait} s: {hub.stats()}"
        hub.trained(taken)
        hub.publish(hub._ledger.step)
        if hub._ledger.step % 8 == 0:
            hub._journal.drop_before(hub.state().journal_offset)


def _finish(hub: Any, processes: list[subprocess.Popen]) -> list[dict[str, Any]]:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    reports = []
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert output, errors
        reports.append(json.loads(output))
    hub.stop()
    hub._journal.close()
    return reports


def _engine_process(address: str, folder: str, tokens: int, engines: int, fsync: bool, keys: str) -> int:
    """Links that send samples made beforehand as fast as leases come; prints what they did."""
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    links = [
        make_link(
            address, Path(folder) / "spool", heartbeat_seconds=0.5, limit_bytes=256 << 20, max_message_bytes=64 << 20,
            keys=load_engine_keys(Path(keys)) if keys else None, fsync=fsync, on_event=lambda line: None,
        )
        for _ in range(engines)
    ]  # fmt: skip
    template = trajectory(source(0, 0), 0, tokens=tokens)
    credit = max(2 * GROUP, 2048 // max(1, tokens // 512))
    held: list[int] = [0] * engines
    for link in links:
        link.start()
    samples, began = 0, _cpu()
    while not stopping.is_set():
        worked = False
        for index, link in enumerate(links):
            for event in link.poll(0.0):
                match event:
                    case Granted(leases):
                        worked = True
                        for lease in leases:
                            samples += _answer(link, template, lease)
                    case Drained() | Failed():
                        stopping.set()
                    case Revoked():
                        pass  # answered already; what was lost with a connection comes again as a lease
            queued = link.stats().queued
            held[index] = queued
            link.update((), max(0, credit - queued), 1 << 20, samples, 0.0)
        if not worked:
            time.sleep(0.001)
    used = _cpu() - began
    for link in links:
        link.stop()
    print(json.dumps({"samples": samples, "cpu_seconds": used}))
    return 0


def _answer(link: Any, template: messages.Trajectory, lease: messages.Lease) -> int:
    prompt = np.asarray(lease.prompt_ids, np.uint32)
    for sample in range(lease.group_size):
        header = msgspec.structs.replace(
            template.header, lease=lease.id, sample=sample, prompt_tokens=len(prompt),
            reward_parts={"submitted": time.monotonic()},
        )  # fmt: skip
        link.submit(msgspec.structs.replace(template, header=header, prompt_ids=prompt))
    return lease.group_size


# ---- beside another stream -----------------------------------------------------------------------------------------


def _compared(folder: Path, seconds: float, repeats: int, tokens: int = 8192) -> list[dict[str, Any]]:
    """Ours without keys and fsync, and the other, in turns; ratios of trajectories a second.

    The other as it is keeps nothing on disk and stops at lists; and made to do what ours does in any case: sender and
    reader append each message to a file, and the reader ends with arrays.
    """
    rates: dict[str, list[float]] = {"ours": [], "pubsub": [], "pubsub-on-disk": []}
    for number in range(repeats):
        case: dict[str, Any] = {"tokens": tokens, "engines": 1, "curve": False, "fsync": False}
        rates["ours"].append(_stream(folder / f"compared-{number}", seconds, **case)["trajectories_per_second"])
        shutil.rmtree(folder / f"compared-{number}")
        rates["pubsub"].append(pubsub(seconds, tokens)["trajectories_per_second"])
        rates["pubsub-on-disk"].append(pubsub(seconds, tokens, folder=folder)["trajectories_per_second"])
    rows = []
    for name in ("pubsub", "pubsub-on-disk"):
        ratio = spread([a / b for a, b in zip(rates["ours"], rates[name], strict=True)])
        told = f"{ratio['median']:.2f} x ({ratio['min']:.2f} to {ratio['max']:.2f})"
        print(f"against {name} of lists, {tokens} tokens: {told}")
        rows.append({
            "row": "compared", "tokens": tokens, "other": name, "trajectories_per_second": spread(rates["ours"]),
            "other_trajectories_per_second": spread(rates[name]), "ratio_to_other": ratio,
        })  # fmt: skip
    return rows


def _stalled_reader(folder: Path, tokens: int = 8192, stall: float = 2.0) -> dict[str, Any]:
    """The reader stops for a while in the middle: what is lost for ever."""
    folder.mkdir()
    hub = make_hub(
        folder / "journal", on_event=lambda line: None, lease_seconds=30.0, heartbeat_seconds=1.0,
        limits=Limits(prompt_tokens=16, response_tokens=tokens, vocab_size=1000),
        ledger={"batch_size": 64, "group_size": GROUP, "max_staleness": 4}, sockets={"heartbeat_seconds": 1.0},
    )  # fmt: skip
    hub.restore(None)
    hub.start()
    hub.publish(0)
    process = _start(address=hub.address, folder=str(folder), tokens=tokens, engines=1, fsync=True, keys="")
    _serve(hub, 64, 1.0)
    with hub._changed:  # the socket's thread waits for this lock at the next message
        time.sleep(stall)
    _serve(hub, 64, 2.0)
    hub.check()
    stats = hub.stats()
    account = stats.account
    _finish(hub, [process])
    return {
        "row": "stalled-reader", "seconds": stall, "lost": account.unaccounted + stats.sequence_missing,
        "dropped": sum(account.dropped.values()), "received": stats.received_samples,
        "pubsub_lost": pubsub(2.0, tokens, stall)["lost"],
    }  # fmt: skip


# ---- both --------------------------------------------------------------------------------------------------------


def _start(**settings: Any) -> subprocess.Popen:
    code = "import sys; from benchmarks.transport import main; sys.exit(main(['--engine', sys.argv[1]]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(settings)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).resolve().parents[1],
    )  # fmt: skip


def _shares(count: int, parts: int) -> list[int]:
    return [share for part in range(parts) if (share := (count + part) // parts)]


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _print(row: dict[str, Any]) -> None:
    print(
        f"{row['tokens']:>6} tokens {row['engines']:>3} engines  keys {row['curve']!s:5}  fsync {row['fsync']!s:5}  "
        f"{row['trajectories_per_second']:8.0f} /s {row['MB_per_second']:7.1f} MB/s  "
        f"p50 {row['latency_seconds']['p50'] * 1e3:6.1f} ms p99 {row['latency_seconds']['p99'] * 1e3:7.1f} ms  "
        f"learner CPU {row['learner_cpu_share']:.0%}"
    )
