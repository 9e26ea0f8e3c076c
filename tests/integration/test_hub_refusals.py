"""What the learner does not take, from whom, and that nobody else suffers."""

import msgspec
import pytest

from benchmarks.synthetic import BATCH, DIGEST, GROUP, make_link, source, start_engine, trajectory
from pipeline import codec, messages
from pipeline.engine.link import Failed, Granted
from pipeline.messages import Capabilities
from tests.integration.running import (
    answer,
    eventually,
    hello,
    raw_peer,
    running,
    running_hub,
    send,
    train,
    wait_for,
    wait_for_failure,
)


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


def test_an_engine_whose_samples_are_all_committed_may_serve_another_run(tmp_path):
    for name in ("a", "b"):
        with running_hub(tmp_path / name, run_id=name) as hub:
            link = make_link(hub.address, tmp_path / "spool")
            link.start()
            link.update((), BATCH, 0, 0, 0.0)
            lease = wait_for(link, Granted).leases[0]
            link.submit(*(trajectory(lease, sample) for sample in range(GROUP)))
            assert link.flush(5.0)
            link.stop()


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


ORDINARY = (
    messages.Welcome,
    messages.Window,
    messages.Published,
    messages.Grant,
    messages.Committed,
)


def bad_messages() -> dict[str, list[bytes]]:
    """What an engine should not send about lease 0, by what the learner says to it."""
    lease = source(0, 0)

    def changed(header: dict | None = None, **arrays) -> list[bytes]:
        sample = trajectory(lease, 0, **({"producer": "peer"} | (header or {})))
        for name, array in arrays.items():
            setattr(sample, name, array)
        return codec.encode_trajectory(sample)

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
    with running_hub(tmp_path, events=events, lease_seconds=60.0) as hub:
        holder = raw_peer(hub.address)
        hello(holder, "holder")
        send(holder, codec.encode(messages.Progress(running=(), credit=GROUP, version=0)))
        grant = answer(holder, messages.Welcome, messages.Window, messages.Published)
        assert [lease.id for lease in grant.leases] == [0], (
            "which stays open, so that answers to it are compared with it"
        )
        engine = start_engine(hub.address, tmp_path / "spool")
        with running(engine):
            train(hub, 1, trained)
            for number, (complaint, frames) in enumerate(bad_messages().items(), start=1):
                peer = raw_peer(hub.address)
                hello(peer, "peer", running=(0,))
                send(peer, frames)
                fatal = answer(peer, *ORDINARY)
                assert isinstance(fatal, messages.Fatal), fatal
                assert complaint == "malformed" or complaint in fatal.message
                assert hub.stats().bad_messages == number
                hello(peer, "peer")  # not listened to any more
                peer.close(linger=1000)
                train(hub, 1, trained)
            stranger = raw_peer(hub.address)
            send(stranger, [b"GET / HTTP/1.1"])
            assert isinstance(answer(stranger), messages.Fatal)
            stranger.close(linger=0)
            train(hub, 2, trained)
            assert hub.stats().engines == 2
            hub._ledger.check()
            holder.close(linger=0)
    assert len(trained) == len(set(trained))
    assert any("no engine" in event for event in events)


def test_an_engine_that_sent_a_bad_message_hears_that_it_is_the_one_to_blame(tmp_path):
    with running_hub(tmp_path) as hub:
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        link.update((), BATCH, 0, 0, 0.0)
        lease = wait_for(link, Granted).leases[0]
        link.submit(trajectory(lease, 0, tokens=65))
        message = wait_for_failure(link).message
        assert message.startswith("the learner refuses what this engine sent: ") and "65" in message
        link.stop()


def test_sample_larger_than_a_message_is_dropped_with_a_reason_and_the_run_goes_on(tmp_path):
    events = []
    with running_hub(tmp_path) as hub:
        link = make_link(hub.address, tmp_path / "spool", max_message_bytes=2000, on_event=events.append)
        link.start()
        link.update((), BATCH, 0, 0, 0.0)
        leases = wait_for(link, Granted).leases
        for lease in leases:
            for sample in range(GROUP):
                link.submit(trajectory(lease, sample, tokens=64 if lease is not leases[0] or sample else 1000))
        batch = hub.take(len(leases), ordered=False, timeout=10.0)
        assert batch is not None and batch.groups[0].failed == {0: "too_large"}
        assert hub.stats().dropped == {"too_large": 1} and hub.stats().engines == 1
        assert any("transport.max_message_bytes = 2000" in line for line in events)
        link.stop()


def test_only_the_holder_of_a_lease_can_fail_its_samples_and_in_few_words(tmp_path):
    with running_hub(tmp_path, lease_seconds=30.0) as hub:
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        link.update((), BATCH, 0, 0, 0.0)
        leases = wait_for(link, Granted).leases
        peer = raw_peer(hub.address)
        hello(peer, "other")
        failed = [messages.SampleFailed(lease=lease.id, sample=0, reason="reward_error", detail="") for lease in leases]
        for message in failed:
            send(peer, codec.encode(message))
        welcomed = messages.Welcome, messages.Window, messages.Published
        assert answer(peer, *welcomed) == messages.Committed(samples=((leases[0].id, 0),)), "it is rid of it"
        assert not hub.stats().dropped
        for lease in leases:
            link.fail_sample(lease.id, 0, "reward_error", "x" * 10_000)
        eventually(lambda: hub.stats().dropped == {"reward_error": len(leases)})
        assert hub.stats().journal_bytes < len(leases) * 5000
        send(peer, codec.encode(msgspec.structs.replace(failed[0], detail="x" * 10_000)))
        eventually(lambda: hub.stats().bad_messages == 1 and hub.stats().engines == 1)
        peer.close(linger=0)
        link.stop()


def test_message_larger_than_allowed_ends_the_connection_and_not_the_learner(tmp_path):
    trained = []
    with running_hub(tmp_path) as hub:
        engine = start_engine(hub.address, tmp_path / "spool")
        with running(engine):
            peer = raw_peer(hub.address)
            hello(peer, "peer")
            assert isinstance(answer(peer), messages.Welcome)
            peer.send_multipart([bytes((64 << 20) + 1)])
            train(hub, 3, trained)
            peer.close(linger=0)
            assert hub.stats().bad_messages == 0
    assert len(trained) == len(set(trained))
