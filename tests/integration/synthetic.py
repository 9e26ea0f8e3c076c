"""An engine and a learner without models, each a real process around the real link and hub.

`python synthetic.py engine|learner '{"...": ...}'`; what they did is printed or written as JSON.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np

from learner.hub import Hub, Limits
from learner.journal import Journal
from learner.leases import Ledger, LedgerState
from pipeline.engine.link import Drained, Failed, Granted, Link, Revoked, VersionHint
from pipeline.messages import SCHEMA, Capabilities, Lease, SamplingParams, Trajectory, TrajectoryHeader
from pipeline.transport.spool import Spool
from pipeline.transport.zmq import ZmqEngineSocket, ZmqLearnerSocket

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


def trajectory(lease: Lease, sample: int, version: int = 0, /, **header) -> Trajectory:
    """Tokens are a function of the lease's seed; the reward tells the samples of a group apart."""
    tokens = 3 + lease.seeds[sample] % 5
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


def make_link(address: str, spool: Path, **options) -> Link:
    settings = {
        "digest": DIGEST,
        "capabilities": Capabilities(entropy=True),
        "heartbeat_seconds": HEARTBEAT,
        "connect_timeout": 20.0,
        "on_event": lambda line: print(line, file=sys.stderr),
    }
    limit = options.pop("limit_bytes", 1 << 20)
    largest = options.pop("max_message_bytes", 1 << 20)
    socket = ZmqEngineSocket(address, heartbeat_seconds=HEARTBEAT, tick_seconds=0.05, max_message_bytes=largest)
    return Link(socket, Spool.acquire(spool, limit), **(settings | options))


def make_hub(folder: Path, address: str = "tcp://127.0.0.1:*", *, events=None, ledger=None, **options) -> Hub:
    settings = {
        "run_id": "run",
        "digest": DIGEST,
        "needs": Capabilities(entropy=True),
        "heartbeat_seconds": HEARTBEAT,
        "lease_seconds": 2.0,
        "limits": LIMITS,
        "on_event": events.append if events is not None else lambda line: print(line, file=sys.stderr),
    } | options
    sizes = {"batch_size": BATCH, "group_size": GROUP, "max_staleness": 1, "lease_seconds": settings["lease_seconds"]}
    socket = ZmqLearnerSocket(address, heartbeat_seconds=HEARTBEAT, tick_seconds=0.05)
    return Hub(socket, Journal(folder), Ledger(**(sizes | (ledger or {}))), source, **settings)


def start_engine(address: str, spool: Path, **options) -> subprocess.Popen:
    return _start("engine", address=address, spool=str(spool), **options)


def start_learner(folder: Path, **options) -> subprocess.Popen:
    return _start("learner", folder=str(folder), **options)


def _start(role: str, **options) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, __file__, role, json.dumps(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run_engine(
    address: str, spool: str, sample_seconds: float = 0.002, fail_every: int = 0, connect_timeout: float = 20.0
) -> None:
    """Samples each leased group and submits it; ends when drained or failed."""
    link = make_link(address, Path(spool), connect_timeout=connect_timeout)
    link.start()
    work: dict[int, Lease] = {}
    version, tokens, ended = -1, 0, ""
    while not ended:
        for event in link.poll(0.0 if work else 0.02):
            match event:
                case Granted(leases):
                    work |= {lease.id: lease for lease in leases}
                case VersionHint(hint):
                    version = hint
                case Revoked(leases):
                    for lease in leases:
                        work.pop(lease, None)
                case Drained():
                    ended = "drained"
                case Failed(message, refused):
                    ended = f"refused: {message}" if refused else f"failed: {message}"
        if work and not ended:
            lease = work.pop(next(iter(work)))
            for sample in range(lease.group_size):
                time.sleep(sample_seconds)
                tokens += 1
                if fail_every and (lease.id * GROUP + sample) % fail_every == 0:
                    link.fail_sample(lease.id, sample, "reward_error", "no answer")
                else:
                    link.submit(trajectory(lease, sample, max(version, 0)))
        link.update(tuple(work), max(0, 3 * BATCH - GROUP * len(work)), version, tokens, tokens * 0.01)
    if ended == "drained":
        link.leave(tuple(work))
        ended += " and flushed" if link.flush(5.0) else " with samples left"
    link.stop()
    print(json.dumps({"ended": ended}))


class LearnerState(msgspec.Struct):
    """A checkpoint as a real learner has it: what was trained, and the ledger, in one atomic file."""

    trained: list[tuple[int, int]]
    ledger: LedgerState


def run_learner(folder: str, address: str, steps: int, checkpoint_every: int = 2, step_seconds: float = 0.05) -> None:
    """Takes batches, "trains" them, checkpoints; resumes from the last checkpoint."""
    root = Path(folder)
    path = root / "checkpoint.json"
    state = LearnerState([], LedgerState())
    if path.exists():
        state = msgspec.json.decode(path.read_bytes(), type=LearnerState)
    hub = make_hub(root / "journal", address)
    hub.restore(state.ledger if path.exists() else None)
    version = _next_version(root)
    hub.start()
    hub.publish(version)
    step = state.ledger.step
    while step < steps:
        batch = hub.take(BATCH // GROUP, ordered=False, timeout=30.0)
        assert batch is not None, hub.stats()
        time.sleep(step_seconds)
        state.trained += [t.id for group in batch.groups for t in group.trajectories]
        step += 1
        version = _next_version(root)
        hub.publish(version)
        hub.trained(batch)
        if step % checkpoint_every == 0 or step == steps:
            state.ledger = hub.state()
            _write(path, msgspec.json.encode(state))
            hub._journal.drop_before(state.ledger.journal_offset)
        _write(root / "step", str(step).encode())
    left = hub.drain(10.0)
    hub._ledger.check()
    stats = hub.stats()
    hub.stop()
    hub._journal.close()
    print(json.dumps({
        "trained": state.trained, "left": left, "dropped": stats.dropped, "trained_samples": stats.trained_samples,
        "next_lease": hub.state().next_lease, "in_flight": stats.in_flight, "buffered": stats.buffered,
    }))  # fmt: skip


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
    {"engine": run_engine, "learner": run_learner}[sys.argv[1]](**json.loads(sys.argv[2]))
