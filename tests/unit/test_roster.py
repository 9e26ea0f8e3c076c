"""Who is connected, and how much each can be given."""

import pytest

from learner.roster import Engine, Roster
from pipeline.messages import Progress


def progress(credit: int = 0, running: tuple[int, ...] = (), tokens: int = 0, seconds: float = 0.0) -> Progress:
    return Progress(running=running, credit=credit, version=0, generated_tokens=tokens, busy_seconds=seconds)


def connect(roster: Roster, producer: str, incarnation: int = 0, peer: bytes | None = None) -> Engine:
    engine = Engine(peer or producer.encode(), producer, incarnation, heard=0.0)
    roster.add(engine)
    return engine


def test_engine_with_most_credit_is_served_first():
    roster = Roster()
    a, b = connect(roster, "a"), connect(roster, "b")
    assert roster.freest(4) is None
    roster.progress(a, progress(credit=12, running=(1,)))
    roster.progress(b, progress(credit=9, running=(2,)))
    order = []
    while (engine := roster.freest(4)) is not None:
        engine.unseen[len(order)] = 4
        order.append(engine.producer)
    assert order == ["a", "b", "a", "b", "a"]


def test_credit_said_before_a_grant_arrived_is_not_spent_twice():
    roster = Roster()
    engine = connect(roster, "a")
    roster.progress(engine, progress(credit=8))
    engine.unseen[5] = 8
    roster.progress(engine, progress(credit=8))  # on its way when lease 5 was granted
    assert engine.free == 0 and roster.credit == 0
    roster.progress(engine, progress(credit=8, running=(5,)))
    assert engine.free == 8


def test_group_larger_than_an_engine_goes_to_it_when_it_is_idle():
    roster = Roster()
    engine = connect(roster, "a")
    roster.progress(engine, progress(credit=4))
    assert roster.freest(8) is engine
    roster.progress(engine, progress(credit=4, running=(1,)))
    assert roster.freest(8) is None


def test_draining_engine_gets_nothing():
    roster = Roster()
    engine = connect(roster, "a")
    roster.progress(engine, progress(credit=100))
    engine.draining = True
    assert roster.freest(1) is None


def test_totals_survive_restarts_of_engines_and_of_the_learner():
    roster = Roster()
    lived_on = connect(roster, "a", incarnation=3)
    roster.progress(lived_on, progress(tokens=1000, seconds=10.0))  # done before this learner started
    roster.progress(lived_on, progress(tokens=1500, seconds=12.0))
    roster.remove(lived_on.peer)
    restarted = connect(roster, "a", incarnation=4)
    roster.progress(restarted, progress(tokens=0))
    roster.progress(restarted, progress(tokens=70, seconds=1.5))
    assert roster.generated_tokens == 570
    assert roster.busy_seconds == pytest.approx(3.5)


def test_producer_on_a_new_connection_replaces_itself():
    roster = Roster()
    old = connect(roster, "a", peer=b"1")
    assert roster.add(old) is None, "HELLO again on the same connection"
    assert roster.add(Engine(b"2", "a", 0, 0.0)) is old
    assert len(roster) == 1 and roster.peer_of("a") == b"2" and roster.get(b"1") is None


def test_all_have_failed_only_when_nobody_is_left_who_may_come_back():
    roster = Roster()
    assert roster.all_failed() == []
    a, b, c = connect(roster, "a"), connect(roster, "b"), connect(roster, "c")
    roster.failed(a, "no memory")
    assert roster.all_failed() == []
    roster.left(b)
    roster.remove(c.peer)  # killed, say: it may be started again
    assert roster.all_failed() == []
    connect(roster, "c")
    roster.failed(c, "no disk")
    assert roster.all_failed() == ["a no memory", "c no disk"]
    connect(roster, "a")
    assert roster.all_failed() == []


def test_engines_that_come_and_go_for_ever_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("learner.roster._PRODUCERS", 10)
    roster = Roster()
    stays = connect(roster, "stays")
    roster.progress(stays, progress())
    for number in range(100):
        guest = connect(roster, f"guest-{number}", incarnation=number)
        roster.progress(guest, Progress(running=(), credit=0, version=0))
        seconds = {f"state-{number}": 1.0, "generating": 2.0}
        roster.progress(
            guest, Progress(running=(), credit=0, version=0, generated_tokens=3, busy_seconds=0.5, seconds=seconds)
        )
        roster.remove(guest.peer)
    assert len(roster._incarnations) <= 12 and len(roster._counters) <= 13 and len(roster._expected) <= 12
    assert roster.generated_tokens == 300 and roster.busy_seconds == 50.0
    assert roster.seconds["generating"] == 200.0 and len(roster.seconds) <= 32
    assert roster.newest_incarnation("stays") == 0 and roster.newest_incarnation("guest-99") == 99
