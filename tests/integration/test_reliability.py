"""Nothing is lost and nobody waits for ever, whatever is slow, full, or damaged."""

import os
import signal
import threading
import time
from dataclasses import replace

import msgspec
import pytest

from benchmarks.synthetic import (
    BATCH,
    GROUP,
    LIMITS,
    make_hub,
    make_link,
    read_trained,
    source,
    start_engine,
    start_learner,
    trajectory,
)
from learner.journal import Arrived, Journal
from pipeline import codec, messages
from pipeline.engine.link import Granted
from pipeline.errors import RunFailed
from pipeline.failpoints import arm
from tests.integration.running import (
    GROUPS,
    answer,
    ended,
    eventually,
    free_port,
    hello,
    raw_peer,
    running,
    running_hub,
    send,
    train,
    wait_for,
    wait_for_failure,
)


@pytest.fixture(autouse=True)
def disarmed():
    yield
    arm("")


def test_a_small_spool_and_rare_checkpoints_do_not_block_each_other(tmp_path):
    """A 1 MB spool, a checkpoint every 1,000 steps, far more than 1 MB of samples between."""
    trained = []
    with running_hub(tmp_path, ledger={"max_staleness": 2}) as hub:
        engine = start_engine(hub.address, tmp_path / "spool", sample_seconds=0.0)
        with running(engine):
            while hub.stats().received_bytes < 1.5 * (1 << 20):
                train(hub, 20, trained)
            assert hub.drain(10.0) and ended(engine) == "drained and flushed"
        hub.check()
        assert hub.stats().spooled_bytes <= 1 << 20
    assert len(trained) == len(set(trained))


def test_a_stalled_disk_stops_the_engine_and_memory_stays_bounded(tmp_path):
    """Nothing is acknowledged while the journal cannot write; the window closes; with space all goes on."""
    limits = replace(LIMITS, window_samples=8, window_bytes=1 << 20)
    trained = []
    with running_hub(tmp_path, limits=limits, ledger={"max_staleness": 3}) as hub:
        arm("journal.write=enospc")
        engine = start_engine(hub.address, tmp_path / "spool", sample_seconds=0.0)
        with running(engine):
            eventually(lambda: hub.stats().journal_stalled)
            time.sleep(0.5)
            held = hub.stats()
            assert held.received_samples <= 16, "the window, and what was sent before it was known"
            assert held.unjournaled_bytes > 0 and held.buffered < 4 * BATCH
            time.sleep(0.3)
            assert hub.stats().received_samples == held.received_samples
            arm("")
            train(hub, 6, trained)
            eventually(lambda: not hub.stats().journal_stalled)
            assert hub.drain(10.0) and ended(engine) == "drained and flushed"
        hub.check()
        assert hub.stats().unjournaled_bytes == 0
    assert len(trained) == len(set(trained)) == 6 * BATCH


def test_an_engine_that_ignores_its_window_is_told_so_and_ended(tmp_path):
    limits = replace(LIMITS, window_samples=4, window_bytes=200)
    with running_hub(tmp_path, limits=limits, sockets={"max_message_bytes": 1000}, ledger={"max_staleness": 20}) as hub:
        arm("journal.write=enospc")
        peer = raw_peer(hub.address)
        hello(peer, "peer")
        send(peer, codec.encode(messages.Progress(running=(), credit=10 * BATCH, version=0)))
        eventually(lambda: hub.stats().in_flight > BATCH)
        for lease in range(4):
            for sample in range(GROUP):
                send(peer, codec.encode_trajectory(trajectory(source(lease, 0), sample, producer="peer")))
        eventually(lambda: hub.stats().bad_messages == 1)
        assert hub.stats().engines == 0
        arm("")
        peer.close(linger=0)


def test_an_engine_that_says_hello_while_the_journal_waits_is_not_charged_for_good(tmp_path, monkeypatch):
    monkeypatch.setattr("learner.journal._DISK_RETRY_SECONDS", 0.02)
    limits = replace(LIMITS, window_bytes=200)
    with running_hub(tmp_path, limits=limits, sockets={"max_message_bytes": 1000}, ledger={"max_staleness": 20}) as hub:
        peer = raw_peer(hub.address)
        hello(peer, "peer")
        send(peer, codec.encode(messages.Progress(running=(), credit=10 * BATCH, version=0)))
        eventually(lambda: hub.stats().in_flight >= 8 * GROUP)
        assert isinstance(answer(peer), messages.Welcome)
        for lease in range(8):
            arm("journal.write=enospc")
            send(peer, codec.encode_trajectory(trajectory(source(lease, 0), 0, producer="peer")))
            hello(peer, "peer", running=tuple(range(8)))
            while not isinstance(answer(peer), messages.Welcome):
                pass
            assert hub.stats().unjournaled_bytes > 200
            arm("")
            eventually(lambda: hub.stats().unjournaled_bytes == 0)
        assert hub.stats().bad_messages == 0 and hub.stats().engines == 1
        peer.close(linger=0)


def test_a_damaged_journal_costs_the_damaged_sample_alone_and_its_lease_is_issued_again(tmp_path):
    address = f"tcp://127.0.0.1:{free_port()}"
    hub = make_hub(tmp_path / "journal", address)
    hub.restore(None)
    hub.start()
    hub.publish(0)
    link = make_link(address, tmp_path / "spool")
    link.start()
    link.update((), 2 * BATCH, 0, 0, 0.0)
    leases = wait_for(link, Granted).leases
    for lease in leases:
        for sample in range(GROUP):
            link.submit(trajectory(lease, sample))
    assert link.flush(5.0)
    link.stop()
    hub.stop()
    hub._journal.close()
    (path,) = (tmp_path / "journal").glob("*.log")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)

    events, trained = [], []
    again = make_hub(tmp_path / "journal", address, events=events, lease_seconds=0.5)
    again.restore(None)
    assert any("1 damaged stretches" in line for line in events)
    assert len(again.ready()) == len(leases) - 1
    again.start()
    again.publish(1)
    with running(start_engine(address, tmp_path / "another")):
        while again.stats().reissued == 0:
            train(again, 2, trained)
        train(again, 4, trained)
    assert len(trained) == len(set(trained))
    assert again.stats().reissued == 1 and again.stats().journal_damaged == 1
    damaged = {lease.id for lease in leases} - {lease for lease, _ in trained}
    assert damaged == set() or again.stats().in_flight >= GROUP
    again.check()
    again.stop()
    again._journal.close()


def test_a_grant_larger_than_a_message_goes_out_in_parts(tmp_path):
    with running_hub(tmp_path, sockets={"max_message_bytes": 600}) as hub:
        link = make_link(hub.address, tmp_path / "spool", max_message_bytes=600)
        link.start()
        link.update((), 2 * BATCH, 0, 0, 0.0)
        leases, parts, deadline = [], 0, time.monotonic() + 10.0
        while len(leases) < 2 * GROUPS and time.monotonic() < deadline:
            for event in link.poll(0.1):
                if isinstance(event, Granted):
                    leases += event.leases
                    parts += 1
        assert parts > 1
        assert [lease.id for lease in leases] == list(range(2 * GROUPS))
        link.stop()


def test_a_lease_that_fits_no_message_ends_the_run_with_the_key_to_change(tmp_path):
    with running_hub(tmp_path) as hub:
        hub._socket.max_message_bytes = 100
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        link.update((), 2 * BATCH, 0, 0, 0.0)
        with pytest.raises(RunFailed, match=r"lease 0 takes \d+ bytes, more than transport\.max_message_bytes"):
            hub.take(1, ordered=False, timeout=5.0)
        link.stop()


def test_an_error_shows_at_the_other_side_with_its_traceback(tmp_path):
    lines, events = [], []
    with running_hub(tmp_path, events=events) as hub:
        link = make_link(hub.address, tmp_path / "spool", on_event=lines.append)
        link.start()
        eventually(lambda: hub.stats().engines == 1)
        hub.fail("loss is not a number", "File trainer.py, line 7")
        assert wait_for_failure(link).message == "the learner failed: loss is not a number"
        assert any("File trainer.py, line 7" in line for line in lines)
        link.stop()
        other = make_link(hub.address, tmp_path / "other")
        other.start()
        eventually(lambda: other.stats().connected)
        other.fatal("no memory", "File decoder.py, line 9")
        eventually(lambda: any("File decoder.py, line 9" in line for line in events))
        other.stop()


def test_an_engine_that_beats_but_generates_nothing_loses_its_leases(tmp_path):
    """Its socket thread is alive and lists the leases; its main loop hangs."""
    limits = replace(LIMITS, stall_seconds=0.5)
    trained = []
    with running_hub(tmp_path, limits=limits, lease_seconds=1.0) as hub:
        hung = make_link(hub.address, tmp_path / "a")
        hung.start()
        hung.update((), 2 * BATCH, 0, 0, 0.0)
        leases = wait_for(hung, Granted).leases
        hung.update([lease.id for lease in leases], 0, 0, 1, 0.1)
        engine = start_engine(hub.address, tmp_path / "b")
        with running(engine):
            train(hub, 4, trained)
            assert hub.stats().reissued >= 1 and hub.stats().engines == 2
        hung.stop()
    assert len(trained) == len(set(trained)) == 4 * BATCH


def test_a_lost_sample_or_answer_is_asked_after(tmp_path, monkeypatch):
    """Messages vanish without the connection ending: what is not committed in time is gone through again."""
    with running_hub(tmp_path) as hub:
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        link.update((), BATCH, 0, 0, 0.0)
        leases = wait_for(link, Granted).leases
        deliver, lost = hub._reception.on_message, []

        def lose(peer, frames) -> None:
            if len(frames) > 1 and len(lost) < 5:
                lost.append(frames)
            else:
                deliver(peer, frames)

        monkeypatch.setattr(hub._reception, "on_message", lose)
        answer = hub._socket.send

        def lose_answer(peer, frames) -> None:
            if isinstance(codec.decode_from_learner(frames), messages.Committed) and len(lost) < 8:
                lost.append(frames)
            else:
                answer(peer, frames)

        monkeypatch.setattr(hub._socket, "send", lose_answer)
        for lease in leases:
            for sample in range(GROUP):
                link.submit(trajectory(lease, sample))
        link.update((), 0, 0, 0, 0.0)
        assert link.flush(10.0) and len(lost) == 8
        assert hub.stats().buffered == GROUP * len(leases) and hub.stats().engines == 1
        link.stop()


def test_ctrl_c_ends_an_engine_whose_learner_is_away_at_once(tmp_path):
    address = f"tcp://127.0.0.1:{free_port()}"
    hub = make_hub(tmp_path / "journal", address)
    hub.restore(None)
    hub.start()
    hub.publish(0)
    link = make_link(address, tmp_path / "spool")
    link.start()
    link.update((), BATCH, 0, 0, 0.0)
    lease = wait_for(link, Granted).leases[0]
    hub.stop()
    hub._journal.close()
    eventually(lambda: not link.stats().connected)
    link.submit(trajectory(lease, 0))
    began = time.monotonic()
    link.leave([lease.id])
    assert not link.flush(20.0)
    link.stop()
    assert time.monotonic() - began < 4.0


@pytest.mark.parametrize(
    ("side", "failpoints"),
    [
        ("learner", "lease.recorded=kill@5"),
        ("learner", "journal.torn=kill@4"),
        ("learner", "journal.fsync=kill@6"),
        ("learner", "ack.sent=kill@9"),
        ("engine", "spool.torn=kill@3"),
        ("engine", "spool.synced=kill@5"),
        ("engine", "ack.handled=kill@7"),
    ],
)
def test_a_kill_at_a_failpoint_loses_and_repeats_nothing(tmp_path, side, failpoints):
    address = f"tcp://127.0.0.1:{free_port()}"
    folder = tmp_path / "learner"
    folder.mkdir()
    options = {"address": address, "steps": 8, "checkpoint_every": 3, "step_seconds": 0.0}
    armed = {"failpoints": failpoints}
    engine = start_engine(address, tmp_path / "spool", **(armed if side == "engine" else {}))
    learner = start_learner(folder, **options, **(armed if side == "learner" else {}))
    victim = engine if side == "engine" else learner
    with running(engine, learner):
        assert victim.wait(20) == -signal.SIGKILL, "the failpoint was not reached"
        if side == "engine":
            second = start_engine(address, tmp_path / "spool")
        else:
            second = start_learner(folder, **options)
        with running(second):
            output, errors = (second if side == "learner" else learner).communicate(timeout=30)
            assert output, errors
    result = msgspec.json.decode(output)
    trained = read_trained(folder / "trained.jsonl")
    assert len(trained) == len(set(trained)) == 8 * BATCH
    journal = Journal(folder / "journal")
    kept = {(record.lease, record.sample) for _, record in journal.replay() if isinstance(record, Arrived)}
    journal.close()
    assert result["next_lease"] * GROUP == len(trained) + result["buffered"] + result["in_flight"]
    assert len(kept - set(trained)) >= result["buffered"] - GROUP


def test_learner_that_is_stopped_and_continued_finds_its_engines_again(tmp_path):
    address = f"tcp://127.0.0.1:{free_port()}"
    folder = tmp_path / "learner"
    folder.mkdir()
    engine = start_engine(address, tmp_path / "spool")
    learner = start_learner(folder, address=address, steps=10, step_seconds=0.02)
    with running(engine, learner):
        eventually(lambda: (folder / "step").exists() and int((folder / "step").read_text() or 0) >= 2)
        os.kill(learner.pid, signal.SIGSTOP)
        time.sleep(1.0)  # more than the engine's patience of five heartbeats
        os.kill(learner.pid, signal.SIGCONT)
        output, errors = learner.communicate(timeout=20)
        assert output, errors
    trained = read_trained(folder / "trained.jsonl")
    assert len(trained) == len(set(trained)) == 10 * BATCH
    assert threading.active_count() < 20
