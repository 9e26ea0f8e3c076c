"""Real hub, real link, real processes: every sample is trained once or counted, whoever is killed."""

import json
import os
import signal
import threading
import time
from collections import Counter
from contextlib import ExitStack

import pytest

from benchmarks.synthetic import (
    BATCH,
    GROUP,
    HEARTBEAT,
    make_hub,
    make_link,
    read_trained,
    source,
    start_engine,
    start_learner,
    trajectory,
)
from learner.journal import Dropped, Journal
from pipeline.engine.link import Drained, Granted
from tests.integration.running import GROUPS, ended, eventually, free_port, running, running_hub, train, wait_for


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


def test_groups_that_come_too_old_while_a_batch_is_waited_for_are_not_taken(tmp_path):
    with running_hub(tmp_path, ledger={"max_staleness": 9}) as hub:
        hub.publish(2)
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        link.update((), 10 * BATCH, 2, 0, 0.0)
        leases = wait_for(link, Granted).leases
        found = []
        learner = threading.Thread(target=lambda: found.append(hub.take(GROUPS, False, timeout=10.0, max_age=1)))
        learner.start()
        for number, lease in enumerate(leases[: 2 * GROUPS]):
            link.submit(*(trajectory(lease, sample, number % 2) for sample in range(GROUP)))
        learner.join()
        (batch,) = found
        assert [group.lease.id for group in batch.groups] == [lease.id for lease in leases[1 : 2 * GROUPS : 2]]
        assert hub.stats().dropped == {"stale": GROUPS * GROUP}
        hub.check()
        link.stop()
    journal = Journal(tmp_path / "journal")
    dropped = [record for _, record in journal.replay() if isinstance(record, Dropped)]
    journal.close()
    assert dropped == [Dropped(lease.id, "stale") for lease in leases[: 2 * GROUPS : 2]]


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
    """The first engine is stopped with leases in its hands, and goes on later."""
    trained = []
    with running_hub(tmp_path, lease_seconds=0.8) as hub:
        stopped = start_engine(hub.address, tmp_path / "a", sample_seconds=0.1)
        with ExitStack() as processes:
            processes.enter_context(running(stopped))
            eventually(lambda: hub.stats().in_flight > BATCH)
            os.kill(stopped.pid, signal.SIGSTOP)
            processes.enter_context(running(start_engine(hub.address, tmp_path / "b")))
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
    trained = Counter(read_trained(learner_folder / "trained.jsonl"))
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


def test_full_spool_stops_admission_and_nobody_waits(tmp_path):
    """The learner is away and the engine goes on finishing: its loop is not held up, but it asks for nothing new."""
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
    began = time.monotonic()
    for number in range(600):
        lease = leases[number // GROUP] if number < GROUP * len(leases) else source(1000 + number // GROUP, 0)
        link.submit(trajectory(lease, number % GROUP))
    assert time.monotonic() - began < 1.0
    eventually(lambda: link.stats().spooled_bytes >= 20_000)
    link.update((), 2 * BATCH, 0, 0, 0.0)
    time.sleep(0.3)
    link.update((), 2 * BATCH, 0, 0, 0.0)
    assert link._session._standing.credit == 0, "nothing is asked for while there is no room"
    assert link.stats().spooled_bytes < 23_000 and link.stats().queued > 500
    again = make_hub(tmp_path / "journal", address)
    again.restore(None)
    again.start()
    again.publish(1)
    eventually(lambda: link.stats().connected)
    assert link.flush(10.0)
    assert link.stats().blocked_seconds > 0.2
    assert len(again.ready()) == len(leases)
    assert again.stats().dropped == {"unknown_lease": 600 - GROUP * len(leases)}
    link.update((), 2 * BATCH, 0, 0, 0.0)
    assert link._session._standing.credit == 2 * BATCH, "room again, work again"
    eventually(lambda: again.stats().blocked_seconds > 0.2)
    link.stop()
    again.stop()
    again._journal.close()
