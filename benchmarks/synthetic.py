"""An engine and a learner without models, each a real process around the real link and hub, for tests and faults.

`python -m benchmarks.synthetic engine|learner '{"...": ...}'`; what they did is printed or written as JSON.
"""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from learner.audit import TrainedSamples
from learner.hub import Hub, Limits
from learner.journal import Journal
from learner.leases import Ledger, LedgerState
from pipeline.engine.link import Drained, Failed, Granted, Link, Revoked, VersionHint
from pipeline.messages import SCHEMA, Capabilities, Lease, SamplingParams, Trajectory, TrajectoryHeader
from pipeline.stop import StopSignal
from pipeline.transport.dealer import ZmqEngineSocket
from pipeline.transport.router import ZmqLearnerSocket
from pipeline.transport.spool import Spool

GROUP = 4
BATCH = 16
HEARTBEAT = 0.1
DIGEST = {"model": "synthetic", "task": "none"}
LIMITS = Limits(prompt_tokens=16, response_tokens=64, vocab_size=1000)


def source(lease: int, version: int) -> Lease:
    return Lease(
        id=lease, epoch=lease // 100, kind="train", prompt=f"prompt {lease}", prompt_ids=(lease % 100, 7),
        columns={}, group_size=GROUP, sampling=SamplingParams(), seeds=tuple(range(lease, lease + GROUP)),
        version=version,
    )  # fmt: skip


def trajectory(lease: Lease, sample: int, version: int = 0, /, tokens: int = 0, **header: Any) -> Trajectory:
    """Its content is a function of the lease's seed; the reward tells the samples of a group apart.

    Args:
        tokens: of the response; 0: three to seven.
    """
    tokens = tokens or 3 + lease.seeds[sample] % 5
    plain = TrajectoryHeader(
        schema=SCHEMA, producer="", incarnation=0, sequence=0, lease=lease.id, sample=sample,
        prompt_tokens=len(lease.prompt_ids), response_tokens=tokens, has_entropy=True, reward=float(sample),
        reward_parts={}, finish_reason="stop", sampling=lease.sampling, drafters={}, verifications=tokens,
    )  # fmt: skip
    return Trajectory(
        header=msgspec.structs.replace(plain, **header),
        prompt_ids=np.asarray(lease.prompt_ids, np.uint32),
        token_ids=np.full(tokens, lease.seeds[sample] % 1000, np.uint32),
        logprobs=np.full(tokens, -0.5, np.float32),
        entropies=np.full(tokens, 0.5, np.float32),
        versions=np.full(tokens, version, np.uint32),
        samplers=np.zeros(tokens, np.uint8),
        roles=np.zeros(tokens, np.uint8),
    )


def make_link(address: str, spool: Path, **options: Any) -> Link:
    """A link that is not started, with settings for tests where `options` names no others."""
    settings: dict[str, Any] = {
        "digest": DIGEST,
        "capabilities": Capabilities(entropy=True),
        "heartbeat_seconds": HEARTBEAT,
        "connect_timeout": 20.0,
        "on_event": lambda line: print(line, file=sys.stderr),
    }
    limit = options.pop("limit_bytes", 1 << 20)
    largest = options.pop("max_message_bytes", 1 << 20)
    keys = options.pop("keys", None)
    dealer = ZmqEngineSocket(
        address, heartbeat_seconds=HEARTBEAT, tick_seconds=0.05, max_message_bytes=largest, keys=keys
    )
    owner = options.pop("owner", keys.fingerprint if keys else "")
    fsync = options.pop("fsync", True)
    return Link(dealer, Spool.acquire(spool, limit, owner=owner, fsync=fsync), **(settings | options))


def make_hub(
    folder: Path, address: str = "tcp://127.0.0.1:*", *, events: list[str] | None = None,
    ledger: dict[str, Any] | None = None, sockets: dict[str, Any] | None = None, fsync: bool = True, **options: Any,
) -> Hub:  # fmt: skip
    """A hub that is not started, with settings for tests where the arguments name no others."""
    settings: dict[str, Any] = {
        "run_id": "run",
        "digest": DIGEST,
        "needs": Capabilities(entropy=True),
        "heartbeat_seconds": HEARTBEAT,
        "lease_seconds": 2.0,
        "limits": LIMITS,
        "on_event": events.append if events is not None else lambda line: print(line, file=sys.stderr),
    } | options
    sizes = {"batch_size": BATCH, "group_size": GROUP, "max_staleness": 1, "lease_seconds": settings["lease_seconds"]}
    router = ZmqLearnerSocket(address, **({"heartbeat_seconds": HEARTBEAT, "tick_seconds": 0.05} | (sockets or {})))
    return Hub(router, Journal(folder, fsync=fsync), Ledger(**(sizes | (ledger or {}))), source, **settings)


def start_engine(address: str, spool: Path, **options: Any) -> subprocess.Popen:
    return _start("engine", address=address, spool=str(spool), **options)


def start_learner(folder: Path, **options: Any) -> subprocess.Popen:
    return _start("learner", folder=str(folder), **options)


def _start(role: str, failpoints: str = "", **options: Any) -> subprocess.Popen:
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": root}
    environment |= {"ROLLAHEAD_FAILPOINTS": failpoints}
    command = [sys.executable, "-m", "benchmarks.synthetic", role, json.dumps(options)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=root
    )


def run_engine(
    address: str, spool: str, sample_seconds: float = 0.002, fail_every: int = 0, connect_timeout: float = 20.0,
    tokens: int = 0, limit_bytes: int = 1 << 20,
) -> None:  # fmt: skip
    """Samples each leased group and submits it; ends when drained, failed, or asked to by SIGTERM."""
    link = make_link(
        address, Path(spool), connect_timeout=connect_timeout, limit_bytes=limit_bytes, max_message_bytes=4 << 20
    )
    stop = StopSignal()
    link.start()
    work: dict[int, Lease] = {}
    version, generated, ended = -1, 0, ""
    while not ended:
        if stop.requested:
            ended = "drained"
        for event in link.poll(0.0 if work else 0.02):
            match event:
                case Granted(leases):
                    work |= {lease.id: lease for lease in leases}
                case VersionHint(hint):
                    version = hint
                case Revoked(leases):
                    for unwanted in leases:
                        work.pop(unwanted, None)
                case Drained():
                    ended = "drained"
                case Failed(message, refused):
                    ended = f"refused: {message}" if refused else f"failed: {message}"
        if work and not ended:
            lease = work.pop(next(iter(work)))
            for sample in range(lease.group_size):
                if sample_seconds:
                    time.sleep(sample_seconds)
                generated += 1
                if fail_every and (lease.id * GROUP + sample) % fail_every == 0:
                    link.fail_sample(lease.id, sample, "reward_error", "no answer")
                else:
                    link.submit(trajectory(lease, sample, max(version, 0), tokens=tokens))
        link.update(tuple(work), max(0, 3 * BATCH - GROUP * len(work)), version, generated, generated * 0.01)
    if ended == "drained":
        link.leave(tuple(work))
        ended += " and flushed" if link.flush(5.0) else " with samples left"
    link.stop()
    print(json.dumps({"ended": ended}))


def run_learner(
    folder: str, address: str, steps: int, checkpoint_every: int = 2, step_seconds: float = 0.05,
    response_tokens: int = 64, max_staleness: int = 1, take_seconds: float = 30.0,
) -> None:  # fmt: skip
    """Takes batches, "trains" them, checkpoints; resumes from the last checkpoint. SIGTERM ends it after a step."""
    root = Path(folder)
    path = root / "checkpoint.json"
    ledger = msgspec.json.decode(path.read_bytes(), type=LedgerState) if path.exists() else LedgerState()
    stop = StopSignal()
    hub = make_hub(
        root / "journal", address, ledger={"max_staleness": max_staleness},
        limits=replace(LIMITS, response_tokens=response_tokens),
    )  # fmt: skip
    hub.restore(ledger if path.exists() else None)
    trained = TrainedSamples(root / "trained.jsonl", ledger.step)
    version = _next_version(root)
    hub.start()
    hub.publish(version)
    step = ledger.step
    while step < steps and not stop.requested:
        batch = hub.take(BATCH // GROUP, ordered=False, timeout=take_seconds)
        assert batch is not None, hub.stats()
        if step_seconds:
            time.sleep(step_seconds)
        step += 1
        trained.write(step, batch)
        version = _next_version(root)
        hub.publish(version)
        hub.trained(batch)
        hub.check()
        if step % checkpoint_every == 0 or step == steps:
            state = hub.state()
            _write(path, msgspec.json.encode(state))
            hub._journal.drop_before(state.journal_offset)
        _write(root / "step", str(step).encode())
    left = hub.drain(10.0)
    hub.check()
    stats = hub.stats()
    hub.stop()
    hub._journal.close()
    trained.close()
    print(json.dumps({ "left": left, "dropped": stats.dropped,
        "trained_samples": stats.trained_samples, "next_lease": hub.state().next_lease,
        "in_flight": stats.in_flight, "buffered": stats.buffered, "transport": stats.transport(),
    }))  # fmt: skip


def free_address() -> str:
    """A loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def read_trained(path: Path) -> list[tuple[int, int]]:
    """(lease, sample) ids of a trained.jsonl, in the order they were trained on."""
    return [tuple(sample) for line in path.read_text().splitlines() for sample in json.loads(line)["samples"]]


def _next_version(root: Path) -> int:
    """The publication number, durable outside checkpoints."""
    path = root / "version"
    version = int(path.read_text()) + 1 if path.exists() else 0
    _write(path, str(version).encode())
    return version


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


if __name__ == "__main__":
    settings = json.loads(sys.argv[2])
    if sys.argv[1] == "engine":
        run_engine(**settings)
    else:
        run_learner(**settings)
