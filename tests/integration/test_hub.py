"""Real hub, real link, real processes: every sample is trained once or counted, whoever is killed."""

import json
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from learner.hub import Hub
from learner.journal import Arrived, Journal
from pipeline import messages
from pipeline.engine.link import Drained, Failed, Granted, Link
from pipeline.errors import RunFailed, UsageError
from pipeline.messages import SCHEMA, Capabilities
from pipeline.transport.spool import Spool
from pipeline.transport.zmq import ZmqLearnerSocket
from tests.integration.synthetic import (
    BATCH,
    DIGEST,
    GROUP,
    HEARTBEAT,
    make_hub,
    make_link,
    source,
    start_engine,
    start_learner,
    trajectory,
)  # fmt: skip

GROUPS = BATCH // GROUP


@contextmanager
def running_hub(folder: Path, **options) -> Iterator[Hub]:
    hub = make_hub(folder / "journal", **options)
    hub.restore(None)
    hub.start()
    hub.publish(0)
    try:
        yield hub
    finally:
        hub.stop()
        hub._journal.close()


@contextmanager
def running(*processes: subprocess.Popen) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                stream.close()


def train(hub: Hub, steps: int, trained: list, timeout: float = 15.0) -> None:
    for _ in range(steps):
        batch = hub.take(GROUPS, ordered=False, timeout=timeout)
        assert batch is not None, hub.stats()
        trained += [sample.id for group in batch.groups for sample in group.trajectories]
        hub.trained(batch)
        hub.publish(hub.stats().step)


def eventually(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ended(engine: subprocess.Popen) -> str:
    output, errors = engine.communicate(timeout=10)
    assert output, errors
    return json.loads(output)["ended"]


def wait_for(link: Link, kind: type, seconds: float = 10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for event in link.poll(0.1):
            if isinstance(event, kind):
                return event
            assert not isinstance(event, Failed), event
    raise AssertionError(f"no {kind.__name__} in time")


def test_two_engines_serve_a_run_and_leave_when_it_is_over(tmp_path):
    trained = []
    with running_hub(tmp_path, ledger={"max_staleness": 2}) as hub:
        engines = [start_engine(hub.address, tmp_path / "spool", fail_every=19) for _ in range(2)]
        with running(*engines):
            eventually(lambda: hub.stats().engines == 2)
            train(hub, 15, trained)
            assert hub.drain(10.0)
            assert [ended(engine) for engine in engines] == ["drained and flushed"] * 2
        stats = hub.stats()
        hub._ledger.check()
    assert len(trained) == len(set(trained)) == stats.trained_samples
    assert set(stats.dropped) == {"reward_error"}
    accounted = stats.trained_samples + stats.dropped["reward_error"] + stats.buffered + stats.in_flight
    assert hub.state().next_lease * GROUP == accounted
    assert stats.generated_tokens > len(trained) / 2 and stats.busy_seconds == pytest.approx(
        stats.generated_tokens * 0.01
    )
    assert stats.spooled_bytes == 0 or stats.engines == 0


def test_synchronous_mode_starts_all_leases_of_a_batch_together(tmp_path):
    with running_hub(tmp_path, ledger={"max_staleness": 0}) as hub:
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        for step in range(3):
            link.update((), 10 * BATCH, step - 1, 0, 0.0)
            leases = wait_for(link, Granted).leases
            assert [lease.id for lease in leases] == list(range(step * GROUPS, (step + 1) * GROUPS))
            assert {lease.version for lease in leases} == {step}
            for lease in reversed(leases):
                for sample in range(GROUP):
                    link.submit(trajectory(lease, sample))
            link.update((), 10 * BATCH, step, 0, 0.0)
            batch = hub.take(GROUPS, ordered=True, timeout=5.0)
            assert [group.lease.id for group in batch.groups] == [lease.id for lease in leases]
            hub.trained(batch)
            time.sleep(3 * HEARTBEAT)
            assert link.poll(0) == [], "nothing is granted before the next publication"
            hub.publish(step + 1)
        link.stop()


def test_killed_engine_loses_nothing_that_it_had_spooled(tmp_path):
    trained = []
    with running_hub(tmp_path, lease_seconds=1.0) as hub:
        first = start_engine(hub.address, tmp_path / "spool", sample_seconds=0.02)
        with running(first):
            train(hub, 2, trained)
            os.kill(first.pid, signal.SIGKILL)
            first.wait()
        (spool,) = (tmp_path / "spool").iterdir()
        second = start_engine(hub.address, tmp_path / "spool")
        with running(second):
            train(hub, 6, trained)
            assert hub.drain(10.0)
            assert ended(second) == "drained and flushed"
        hub._ledger.check()
        stats = hub.stats()
    assert list((tmp_path / "spool").iterdir()) == [spool], "the second engine went on with the first one's spool"
    assert len(trained) == len(set(trained)) == 8 * BATCH
    assert stats.reissued >= 1
    assert set(stats.dropped) <= {"duplicate"}


def test_silent_engines_leases_go_to_another(tmp_path):
    """The first engine stops for good without a word, with leases in its hands."""
    trained = []
    with running_hub(tmp_path, lease_seconds=0.8) as hub:
        stopped = start_engine(hub.address, tmp_path / "a", sample_seconds=0.02)
        other = start_engine(hub.address, tmp_path / "b", sample_seconds=0.02)
        with running(stopped, other):
            eventually(lambda: hub.stats().engines == 2 and hub.stats().in_flight > BATCH)
            os.kill(stopped.pid, signal.SIGSTOP)
            train(hub, 5, trained)
            assert hub.stats().reissued >= 1
            eventually(lambda: hub.stats().engines == 1)
            # Back again it claims nothing that others have done meanwhile, and what it still sends is counted.
            os.kill(stopped.pid, signal.SIGCONT)
            eventually(lambda: hub.stats().engines == 2)
            train(hub, 3, trained)
        hub._ledger.check()
    assert len(trained) == len(set(trained)) == 8 * BATCH


@pytest.mark.parametrize("kill_engine_too", [False, True])
def test_killed_learner_resumes_and_trains_every_sample_once(tmp_path, kill_engine_too):
    address = f"tcp://127.0.0.1:{free_port()}"
    learner_folder = tmp_path / "learner"
    learner_folder.mkdir()

    def step() -> int:
        path = learner_folder / "step"
        return int(path.read_text()) if path.exists() else 0

    processes = [start_engine(address, tmp_path / "spool", sample_seconds=0.001)]
    with running(*processes):
        killed_at = 0
        for _ in range(3):
            learner = start_learner(learner_folder, address=address, steps=20, checkpoint_every=3, step_seconds=0.02)
            with running(learner):
                target = killed_at + 4
                eventually(lambda target=target, learner=learner: step() >= target or learner.poll() is not None, 15.0)
                assert learner.poll() is None, learner.stderr.read()
                os.kill(learner.pid, signal.SIGKILL)
                learner.wait()
            killed_at = step() - step() % 3
        if kill_engine_too:
            os.kill(processes[0].pid, signal.SIGKILL)
            processes[0].wait()
            processes.append(start_engine(address, tmp_path / "spool", sample_seconds=0.001))
        with running(*processes[1:]):
            learner = start_learner(learner_folder, address=address, steps=20, checkpoint_every=3, step_seconds=0.0)
            with running(learner):
                output, errors = learner.communicate(timeout=20)
                assert output, errors
                assert ended(processes[-1]) == "drained and flushed"
    result = json.loads(output)
    trained = Counter(tuple(sample) for sample in result["trained"])
    assert max(trained.values()) == 1
    assert len(trained) == result["trained_samples"] == 20 * BATCH
    lost = sum(count for reason, count in result["dropped"].items() if reason not in ("duplicate", "unknown_lease"))
    assert result["next_lease"] * GROUP == len(trained) + lost + result["buffered"] + result["in_flight"]


def test_sample_committed_before_the_learner_died_is_not_sampled_again(tmp_path):
    hub = make_hub(tmp_path / "journal")
    hub.restore(None)
    hub.start()
    hub.publish(0)
    link = make_link(hub.address, tmp_path / "spool")
    link.start()
    link.update((), 2 * BATCH, 0, 0, 0.0)
    leases = wait_for(link, Granted).leases
    for lease in leases[:-1]:
        for sample in range(GROUP):
            link.submit(trajectory(lease, sample))
    assert link.flush(5.0) and link.stats().spooled == 0
    link.update((leases[-1].id,), 0, 0, 0, 0.0)
    address = hub.address
    hub.stop()  # no state saved, no farewell: the journal is all there is
    hub._journal.close()

    again = make_hub(tmp_path / "journal", address)
    again.restore(None)
    assert [group.lease.id for group in again.ready()] == [lease.id for lease in leases[:-1]]
    again.start()
    again.publish(1)
    eventually(lambda: again.stats().engines == 1)
    for sample in range(GROUP):
        link.submit(trajectory(leases[-1], sample))
    link.update((), 0, 0, 0, 0.0)
    assert link.flush(5.0)
    assert len(again.ready()) == len(leases)
    assert again.stats().reissued == 0 and again.stats().dropped == {}
    link.stop()
    again.stop()
    again._journal.close()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"digest": DIGEST | {"model": "another"}}, "model: learner synthetic, engine another"),
        ({"digest": {"model": "synthetic", "extra": "1"}}, "extra: learner none, engine 1; task: learner none"),
        ({"capabilities": Capabilities(entropy=False)}, "entropies"),
    ],
)
def test_engine_that_does_not_fit_is_refused_with_the_reason(tmp_path, options, complaint):
    events = []
    with running_hub(tmp_path, events=events) as hub:
        link = make_link(hub.address, tmp_path / "spool", **options)
        link.start()
        (event,) = link.poll(5.0)
        assert isinstance(event, Failed) and event.refused and complaint in event.message
        for number in range(300):  # more than the queue holds; a dead link must not hold its engine
            link.submit(trajectory(source(number, 0), 0))
        link.stop()
        assert hub.stats().engines == 0 and complaint in events[-1]


def test_spool_of_another_run_is_refused(tmp_path):
    with running_hub(tmp_path / "a") as hub:
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        link.update((), BATCH, 0, 0, 0.0)
        lease = wait_for(link, Granted).leases[0]
    link.submit(trajectory(lease, 0))
    assert not link.flush(0.3)
    link.stop()
    with running_hub(tmp_path / "b", run_id="another") as hub:
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        event = link.poll(5.0)[0]
        assert isinstance(event, Failed) and "serves run another" in event.message
        link.stop()
        assert hub.stats().dropped == {}


def test_newer_incarnation_takes_over_from_an_older_one(tmp_path):
    with running_hub(tmp_path) as hub:
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        eventually(lambda: hub.stats().engines == 1)
        (folder,) = (tmp_path / "spool").iterdir()
        peer = raw_peer(hub.address)
        hello(peer, folder.name, incarnation=7)
        assert isinstance(answer(peer), messages.Welcome)
        event = wait_for_failure(link)
        assert event.refused and "incarnation 7" in event.message
        assert hub.stats().engines == 1
        late = raw_peer(hub.address)
        hello(late, folder.name, incarnation=6)
        assert isinstance(answer(late), messages.Refused)
        link.stop()
        for socket_ in (peer, late):
            socket_.close(linger=0)


def raw_peer(address: str) -> zmq.Socket:
    peer = zmq.Context.instance().socket(zmq.DEALER)
    peer.setsockopt(zmq.RCVTIMEO, 5000)
    peer.connect(address)
    return peer


def hello(peer: zmq.Socket, producer: str, incarnation: int = 0, **fields) -> None:
    message = messages.Hello(
        schema=SCHEMA, producer=producer, incarnation=incarnation, digest=DIGEST,
        capabilities=Capabilities(entropy=True), **fields,
    )  # fmt: skip
    peer.send_multipart(messages.encode(message))


def answer(peer: zmq.Socket, *skipped: type):
    while True:
        message = messages.decode_from_learner(peer.recv_multipart())
        if not isinstance(message, skipped):
            return message


ORDINARY = (messages.Welcome, messages.Published, messages.Grant, messages.Received, messages.Committed)


def bad_messages() -> dict[str, list[bytes]]:
    """What an engine should not send about lease 0, by what the learner says to it."""
    lease = source(0, 0)

    def changed(header: dict | None = None, **arrays) -> list[bytes]:
        sample = trajectory(lease, 0, **({"producer": "peer"} | (header or {})))
        for name, array in arrays.items():
            setattr(sample, name, array)
        return messages.encode_trajectory(sample)

    good = trajectory(lease, 0)
    empty = {name: getattr(good, name)[:0] for name in ("token_ids", "logprobs", "entropies", "versions", "samplers")}
    return {
        "response of 0 tokens": changed({"response_tokens": 0}, **empty, roles=good.roles[:0]),
        "of producer other": changed({"producer": "other"}),
        "in groups of 4": changed({"sample": GROUP}),
        "sampled with": changed({"sampling": messages.SamplingParams(temperature=0.5)}),
        "another prompt": changed(prompt_ids=good.prompt_ids + 1),
        "vocabulary of 1000": changed(token_ids=good.token_ids + 5000),
        "no entropies": changed({"has_entropy": False}, entropies=None),
        "array frame": [*changed()[:-1], b"x"],
        "malformed": [b"\xc1garbage"],
    }


def test_bad_messages_end_their_sender_and_nobody_else(tmp_path):
    events, trained = [], []
    with running_hub(tmp_path, events=events) as hub:
        engine = start_engine(hub.address, tmp_path / "spool")
        with running(engine):
            train(hub, 1, trained)
            for number, (complaint, frames) in enumerate(bad_messages().items(), start=1):
                peer = raw_peer(hub.address)
                hello(peer, "peer", running=(0,))
                peer.send_multipart(frames)
                fatal = answer(peer, *ORDINARY)
                assert isinstance(fatal, messages.Fatal), fatal
                assert complaint == "malformed" or complaint in fatal.message
                assert hub.stats().bad_messages == number
                hello(peer, "peer")  # not listened to any more
                peer.close(linger=1000)
                train(hub, 1, trained)
            stranger = raw_peer(hub.address)
            stranger.send_multipart([b"GET / HTTP/1.1"])
            assert isinstance(answer(stranger), messages.Fatal)
            stranger.close(linger=0)
            train(hub, 2, trained)
            assert hub.stats().engines == 1
            hub._ledger.check()
    assert len(trained) == len(set(trained))
    assert any("no engine" in event for event in events)


def test_sends_to_vanished_peers_are_counted(tmp_path):
    with running_hub(tmp_path) as hub:
        peer = raw_peer(hub.address)
        hello(peer, "peer")
        assert isinstance(answer(peer), messages.Welcome)
        peer.close(linger=0)
        time.sleep(0.3)
        hub.publish(1)
        eventually(lambda: hub.stats().sends_lost >= 1 and hub.stats().engines == 0)


def test_run_fails_when_every_engine_ended_by_an_error(tmp_path):
    with running_hub(tmp_path) as hub:
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        eventually(lambda: hub.stats().engines == 1)
        link.fatal("CUDA is on fire", "Traceback ...")
        link.stop()
        with pytest.raises(RunFailed, match="CUDA is on fire"):
            hub.take(1, ordered=False, timeout=5.0)


def test_learners_error_reaches_the_engine(tmp_path):
    with running_hub(tmp_path) as hub:
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        eventually(lambda: hub.stats().engines == 1)
        hub.fail("loss is not a number", "")
        event = wait_for_failure(link)
        assert not event.refused and "loss is not a number" in event.message
        link.stop()


def test_journal_that_cannot_be_written_ends_the_run_and_the_engine_keeps_its_samples(tmp_path):
    with running_hub(tmp_path) as hub:
        engine = start_engine(hub.address, tmp_path / "spool")
        with running(engine):
            train(hub, 1, [])
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hub._journal.size + 3000, hard))  # of this process alone
            try:
                with pytest.raises(RunFailed, match="journal cannot be written"):
                    train(hub, 20, [])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            eventually(lambda: hub.stats().spooled_bytes > 0)
            hub.fail("the journal cannot be written")
            assert "journal" in ended(engine)
    spool = Spool.acquire(tmp_path / "spool", 1 << 20)
    journal = Journal(tmp_path / "journal")
    durable = {(r.lease, r.sample) for _, r in journal.replay() if isinstance(r, Arrived)}
    journal.close()
    assert spool.pending(), "what the journal could not take is with the engine still"
    assert {(0, sample) for sample in range(GROUP)} <= durable


def test_address_in_use_is_a_usage_error_that_names_it(tmp_path):
    with running_hub(tmp_path) as hub:
        second = make_hub(tmp_path / "second", hub.address)
        with pytest.raises(UsageError, match=rf"{hub.address}.*in use.*transport\.address"):
            second.start()
        second.stop()
        second._journal.close()


def test_ipc_address_in_use_is_not_taken_over(tmp_path):
    address = f"ipc://{tmp_path}/socket"
    with running_hub(tmp_path, address=address) as hub:
        second = make_hub(tmp_path / "second", address)
        with pytest.raises(UsageError, match="in use"):
            second.start()
        second._journal.close()
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        eventually(lambda: hub.stats().engines == 1)
        link.stop()


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:5757", "tcp://*:5757", "tcp://192.168.1.2:5757", "tcp://[::]:5757"])
def test_listening_beyond_loopback_is_refused(address):
    with pytest.raises(UsageError, match="needs keys"):
        ZmqLearnerSocket(address).start(None)


def test_engine_gives_up_after_the_connect_timeout(tmp_path):
    address = f"tcp://127.0.0.1:{free_port()}"
    events = []
    link = make_link(address, tmp_path / "spool", connect_timeout=0.4, on_event=events.append)
    link.start()
    began = time.monotonic()
    (event,) = link.poll(5.0)
    assert 0.4 <= time.monotonic() - began < 2.0
    assert isinstance(event, Failed) and not event.refused and address in event.message
    link.stop()


def test_engine_waits_for_a_learner_that_starts_late_and_loses_it_only_for_so_long(tmp_path):
    address = f"tcp://127.0.0.1:{free_port()}"
    events = []
    link = make_link(address, tmp_path / "spool", connect_timeout=1.5, on_event=events.append)
    link.start()
    time.sleep(0.5)
    with running_hub(tmp_path, address=address) as hub:
        eventually(lambda: hub.stats().engines == 1)
    event = wait_for_failure(link)
    assert "no learner" in event.message
    assert any("lost the learner" in line for line in events)
    link.stop()


def wait_for_failure(link: Link) -> Failed:
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        for event in link.poll(0.1):
            if isinstance(event, Failed):
                return event
    raise AssertionError("the link did not fail")


def test_full_spool_holds_the_engine_until_the_learner_is_back(tmp_path):
    address = f"tcp://127.0.0.1:{free_port()}"
    hub = make_hub(tmp_path / "journal", address)
    hub.restore(None)
    hub.start()
    hub.publish(0)
    link = make_link(address, tmp_path / "spool", limit_bytes=20_000)
    link.start()
    link.update((), 2 * BATCH, 0, 0, 0.0)
    leases = wait_for(link, Granted).leases
    hub.stop()
    hub._journal.close()
    eventually(lambda: not link.stats().connected)
    submitted = []

    def submit() -> None:
        for number in range(600):
            lease = leases[number // GROUP] if number < GROUP * len(leases) else source(1000 + number // GROUP, 0)
            link.submit(trajectory(lease, number % GROUP))
            submitted.append(number)

    thread = threading.Thread(target=submit)
    thread.start()
    eventually(lambda: link.stats().spooled_bytes >= 20_000 and link.stats().queued >= 256)
    held = len(submitted)
    time.sleep(0.2)
    assert len(submitted) == held < 600 and link.stats().spooled_bytes < 60_000
    again = make_hub(tmp_path / "journal", address)
    again.restore(None)
    again.start()
    again.publish(1)
    thread.join(10.0)
    assert not thread.is_alive() and link.flush(5.0)
    assert link.stats().blocked_seconds > 0.2
    assert len(again.ready()) == len(leases)
    assert again.stats().dropped == {"unknown_lease": 600 - GROUP * len(leases)}
    link.stop()
    again.stop()
    again._journal.close()


def test_drain_is_an_event(tmp_path):
    with running_hub(tmp_path) as hub:
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        link.update((), BATCH, 0, 0, 0.0)
        leases = wait_for(link, Granted).leases
        assert not hub.drain(0.3), "the engine is there still"
        wait_for(link, Drained)
        link.leave([lease.id for lease in leases])
        assert link.flush(1.0)
        link.stop()
        assert hub.drain(2.0)
        assert hub.stats().in_flight == GROUP * len(leases)
