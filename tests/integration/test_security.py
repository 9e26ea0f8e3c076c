"""Who may come in, and what happens to everybody else."""

import time

import pytest
import zmq

from benchmarks.synthetic import BATCH, GROUP, make_link, trajectory
from pipeline import codec, messages
from pipeline.engine.link import Granted
from pipeline.errors import UsageError
from pipeline.messages import BadMessage
from pipeline.transport.keys import EngineKeys, keygen, load_engine_keys, load_learner_keys
from pipeline.transport.router import ZmqLearnerSocket
from tests.integration.running import (
    eventually,
    hello,
    raw_peer,
    running_hub,
    wait_for,
    wait_for_failure,
)


@pytest.fixture
def keys(tmp_path):
    keygen(tmp_path / "keys", ["engine", "other"])
    return tmp_path / "keys"


@pytest.fixture
def secure_hub(tmp_path, keys):
    events = []
    with running_hub(tmp_path, events=events, sockets={"keys": load_learner_keys(keys)}) as hub:
        hub.events = events
        yield hub


def serve(link, hub) -> None:
    """One group, to show that traffic goes on."""
    link.update((), BATCH, 0, 0, 0.0)
    for lease in wait_for(link, Granted).leases:
        for sample in range(GROUP):
            link.submit(trajectory(lease, sample))
    assert link.flush(5.0)
    link.update((), 0, 0, 0, 0.0)
    assert hub.take(1, ordered=False, timeout=5.0) is not None


def test_an_engine_with_a_listed_key_works_and_its_producer_is_bound_to_it(tmp_path, keys, secure_hub):
    own = load_engine_keys(keys)
    link = make_link(secure_hub.address, tmp_path / "spool", keys=own)
    link.start()
    serve(link, secure_hub)
    (folder,) = (tmp_path / "spool").iterdir()
    assert folder.name.startswith(f"{own.fingerprint}-")
    assert secure_hub.stats().refused_connections == {}
    link.stop()


def test_who_has_another_key_cannot_claim_a_producer(tmp_path, keys, secure_hub):
    victim, thief = load_engine_keys(keys), load_engine_keys(keys, "other")
    link = make_link(secure_hub.address, tmp_path / "spool", keys=victim)
    link.start()
    eventually(lambda: secure_hub.stats().engines == 1)
    for owner in (victim.fingerprint, ""):
        stolen = make_link(secure_hub.address, tmp_path / f"stolen{owner}", keys=thief, owner=owner)
        stolen.start()
        event = wait_for_failure(stolen)
        assert event.refused and "belongs to another key" in event.message
        stolen.stop()
    assert secure_hub.stats().engines == 1
    serve(link, secure_hub)
    link.stop()


def test_a_key_that_is_not_listed_is_refused_logged_and_counted(tmp_path, keys, secure_hub):
    public, secret = zmq.curve_keypair()
    unlisted = EngineKeys(load_engine_keys(keys).learner_public, public, secret)
    link = make_link(secure_hub.address, tmp_path / "spool", keys=unlisted)
    link.start()
    event = wait_for_failure(link)
    assert event.refused and "does not list this engine's key" in event.message and "engines.allow" in event.message
    link.stop()
    eventually(lambda: secure_hub.stats().refused_connections == {"key_not_listed": 1})
    assert any(unlisted.fingerprint in line and "not on the list" in line for line in secure_hub.events)


def test_wrong_keys_and_no_keys_are_refused_and_counted_and_the_engine_is_told_what_to_look_at(
    tmp_path, keys, secure_hub
):
    own = load_engine_keys(keys)
    wrong = EngineKeys(zmq.curve_keypair()[0], own.public, own.secret)
    for number, engine_keys in enumerate((wrong, None)):
        events = []
        link = make_link(
            secure_hub.address, tmp_path / f"spool{number}", keys=engine_keys, connect_timeout=2.5,
            on_event=events.append,
        )  # fmt: skip
        link.start()
        event = wait_for_failure(link)
        assert "no learner" in event.message
        assert any("handshakes failed: see that both sides use keys" in line for line in events)
        link.stop()
        assert secure_hub.stats().refused_connections["no_key_or_wrong_key"] > number
    assert secure_hub.stats().engines == 0 and secure_hub.stats().strangers == 0
    link = make_link(secure_hub.address, tmp_path / "good", keys=own)
    link.start()
    serve(link, secure_hub)
    link.stop()


def test_an_engine_with_keys_does_not_talk_to_a_learner_without(tmp_path, keys):
    with running_hub(tmp_path) as hub:
        link = make_link(hub.address, tmp_path / "spool", keys=load_engine_keys(keys), connect_timeout=1.5)
        link.start()
        assert "no learner" in wait_for_failure(link).message
        link.stop()
        assert hub.stats().engines == 0


def test_taking_a_key_from_the_list_locks_its_engine_out_at_the_next_connection(tmp_path, keys, secure_hub):
    own = load_engine_keys(keys)
    (keys / "engines.allow").write_bytes(load_engine_keys(keys, "other").public + b" other\n")
    link = make_link(secure_hub.address, tmp_path / "spool", keys=own)
    link.start()
    assert wait_for_failure(link).refused
    link.stop()


def test_listening_for_others_needs_keys_or_a_word_that_it_is_meant(keys):
    with pytest.raises(UsageError, match=r"rollahead keygen .*--insecure"):
        ZmqLearnerSocket("tcp://0.0.0.0:*").start(None)

    class Quiet:
        def on_tick(self) -> None: ...

        def on_refused(self, reason: str) -> None: ...

        def on_error(self, error: Exception) -> None: ...

    lines = []
    for options in ({"insecure": True, "warn": lines.append}, {"keys": load_learner_keys(keys)}):
        socket = ZmqLearnerSocket("tcp://0.0.0.0:*", **options)
        socket.start(Quiet())
        socket.stop(0.1)
    assert len(lines) == 1 and lines[0].startswith("WARNING") and "without keys" in lines[0]


def test_damaged_messages_are_noticed_and_sent_again(tmp_path):
    """Something between the two flips a bit: the connection is renewed, the sample arrives, the engine lives."""
    with running_hub(tmp_path) as hub:
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        link.update((), BATCH, 0, 0, 0.0)
        leases = wait_for(link, Granted).leases
        send, damaged = link._socket.send, []

        def flip(frames) -> bool:
            if len(frames) > 1 and not damaged:
                damaged.append(frames)
                with link._socket._lock:
                    sent = [frames[0], bytes([frames[1][0] ^ 1]) + frames[1][1:], b"crc?"]
                    link._socket._outbox.append(sent)
                return link._socket.call(link._socket._look)
            return send(frames)

        link._socket.send = flip
        for lease in leases:
            for sample in range(GROUP):
                link.submit(trajectory(lease, sample))
        assert link.flush(10.0) and damaged
        assert hub.stats().damaged_messages == 1 and link.stats().damaged_messages == 1
        assert hub.stats().buffered == GROUP * len(leases) and hub.stats().bad_messages == 0
        link.stop()


def test_two_processes_with_one_spool_do_not_work_beside_each_other(tmp_path):
    """A spool that was copied: same producer, same incarnation. The one that works goes on, the other is told."""
    with running_hub(tmp_path) as hub:
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        eventually(lambda: hub.stats().engines == 1)
        (folder,) = (tmp_path / "spool").iterdir()
        copy = raw_peer(hub.address)
        hello(copy, folder.name, incarnation=0, instance=123)
        from pipeline.transport.integrity import unseal

        refused = codec.decode_from_learner(unseal(copy.recv_multipart()))
        assert isinstance(refused, messages.Refused) and "another engine process" in refused.reason
        copy.close(linger=0)
        serve(link, hub)
        link.stop()


def test_lines_that_strangers_cause_are_limited(tmp_path):
    events = []
    with running_hub(tmp_path, events=events) as hub:
        for number in range(60):
            hub._reception._reject(b"stranger%d" % number, BadMessage("nonsense"))
        assert hub.stats().bad_messages == 60 and len(events) <= 41
        time.sleep(0.05)
