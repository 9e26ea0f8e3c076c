"""Addresses that cannot be had, peers that are not there, errors that have to travel."""

import resource
import time

import pytest
import zmq

from benchmarks.synthetic import GROUP, make_hub, make_link, start_engine
from learner.journal import Arrived, Journal
from pipeline import codec, messages
from pipeline.engine.link import Failed
from pipeline.errors import RunFailed, UsageError
from pipeline.transport.integrity import unseal
from pipeline.transport.router import ZmqLearnerSocket
from pipeline.transport.spool import Spool
from tests.integration.running import (
    answer,
    ended,
    eventually,
    free_port,
    hello,
    raw_peer,
    running,
    running_hub,
    train,
    wait_for_failure,
)


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
    began = time.monotonic()
    link.start()
    (event,) = link.poll(5.0)
    assert 0.4 <= time.monotonic() - began < 4.0
    assert isinstance(event, Failed) and not event.refused and address in event.message
    link.stop()


def test_engine_waits_for_a_learner_that_starts_late_and_loses_it_only_for_so_long(tmp_path):
    address = f"tcp://127.0.0.1:{free_port()}"
    events = []
    link = make_link(address, tmp_path / "spool", connect_timeout=1.5, on_event=events.append)
    link.start()
    time.sleep(0.5)
    with running_hub(tmp_path, address=address) as hub:
        eventually(lambda: hub.stats().engines == 1 and link.stats().connected)
    event = wait_for_failure(link)
    assert "no learner" in event.message
    assert any("lost the learner" in line for line in events)
    link.stop()


def test_engine_tries_anew_when_the_learner_accepts_it_and_says_nothing(tmp_path):
    listener = zmq.Context.instance().socket(zmq.ROUTER)
    listener.setsockopt(zmq.RCVTIMEO, 5000)
    port = listener.bind_to_random_port("tcp://127.0.0.1")
    link = make_link(f"tcp://127.0.0.1:{port}", tmp_path / "spool")
    link.start()
    peers = set()
    while len(peers) < 3:
        peer, *frames = listener.recv_multipart()
        assert isinstance(codec.decode_from_engine(unseal(frames)), messages.Hello)
        peers.add(peer)
    link.stop()
    listener.close(linger=0)
