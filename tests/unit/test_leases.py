"""The ledger accounts for every sample, admits no more than it may, and trains nothing twice."""

from collections import Counter

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from learner.journal import Arrived, Dropped, Failed, Granted
from learner.leases import Ledger, LedgerState, Outcome
from pipeline.codec import encode_trajectory
from pipeline.messages import SCHEMA, Lease, SamplingParams, Trajectory, TrajectoryHeader

GROUP = 2
BATCH = 4
LEASE_SECONDS = 10.0


def source(lease: int, version: int) -> Lease:
    return Lease(
        id=lease, epoch=0, kind="train", prompt="", prompt_ids=(1,), columns={}, group_size=GROUP,
        sampling=SamplingParams(), seeds=(0,) * GROUP, version=version,
    )  # fmt: skip


def trajectory(lease: int, sample: int, reward: float = 0.0) -> Trajectory:
    header = TrajectoryHeader(
        schema=SCHEMA, producer="p", incarnation=0, sequence=0, lease=lease, sample=sample, prompt_tokens=1,
        response_tokens=1, has_entropy=False, reward=reward, reward_parts={}, finish_reason="stop",
        sampling=SamplingParams(), drafters={}, verifications=1,
    )  # fmt: skip
    ids = np.ones(1, np.uint32)
    return Trajectory(
        header=header, prompt_ids=ids, token_ids=ids, logprobs=np.zeros(1, np.float32), entropies=None, versions=ids,
        samplers=np.zeros(1, np.uint8), roles=np.zeros(1, np.uint8),
    )  # fmt: skip


def make_ledger(max_staleness: int = 1, dynamic_sampling: bool = False) -> Ledger:
    ledger = Ledger(
        batch_size=BATCH, group_size=GROUP, max_staleness=max_staleness, lease_seconds=LEASE_SECONDS,
        dynamic_sampling=dynamic_sampling,
    )  # fmt: skip
    ledger.restore(LedgerState(), [], source, 0.0, 0)
    return ledger


def grant_all(ledger: Ledger, producer: str = "p", now: float = 0.0) -> list[int]:
    leases = []
    while (lease := ledger.grant(producer, source, now, 0)) is not None:
        leases.append(lease.id)
    return leases


def finish(ledger: Ledger, *leases: int) -> None:
    for lease in leases:
        for sample in range(GROUP):
            assert ledger.arrive(trajectory(lease, sample, float(sample))) is Outcome.ACCEPTED


def test_an_account_says_where_every_sample_is_and_a_wrong_one_is_noticed():
    ledger = make_ledger()
    ledger.published(0)
    leases = grant_all(ledger)
    finish(ledger, *leases[:3])
    ledger.fail(leases[3], 0, "reward_error")
    ledger.trained(ledger.take(BATCH // GROUP, ordered=True))
    account = ledger.account()
    assert account.leased == GROUP * len(leases) == 8
    assert (account.trained, account.dropped, account.buffered, account.in_flight) == (4, {"reward_error": 1}, 2, 1)
    ledger.check()
    ledger._table.trained_samples += 1
    with pytest.raises(AssertionError, match="-1 samples are not accounted for"):
        ledger.check()


@pytest.mark.parametrize("publish_first", [False, True])
@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_rollouts_run_ahead_by_the_allowed_batches_in_either_order_of_publication(max_staleness, publish_first):
    ledger = make_ledger(max_staleness)
    assert grant_all(ledger) == []
    ledger.published(5)
    open_leases = grant_all(ledger)
    assert len(open_leases) * GROUP == (max_staleness + 1) * BATCH
    for step in range(4):
        finish(ledger, *open_leases[: BATCH // GROUP])
        batch = ledger.take(BATCH // GROUP, ordered=True)
        assert [group.lease.id for group in batch.groups] == open_leases[: BATCH // GROUP]
        if publish_first:
            ledger.published(6 + step)
            ledger.trained(batch)
        else:
            ledger.trained(batch)
            assert grant_all(ledger) == [], "a lease for a policy that is not published"
            ledger.published(6 + step)
        granted = grant_all(ledger)
        assert len(granted) * GROUP == BATCH
        open_leases = open_leases[BATCH // GROUP :] + granted
        ledger.check()


def test_ordered_batches_do_not_depend_on_who_was_faster():
    ledger = make_ledger()
    ledger.published(0)
    assert grant_all(ledger) == [0, 1, 2, 3]
    finish(ledger, 3, 1, 2)
    assert ledger.take(2, ordered=True) is None
    assert [group.lease.id for group in ledger.ready()] == [3, 1, 2]
    finish(ledger, 0)
    assert [group.lease.id for group in ledger.take(2, ordered=True).groups] == [0, 1]
    assert [group.lease.id for group in ledger.take(2, ordered=True).groups] == [2, 3]


def test_unordered_batches_take_what_is_complete_first():
    ledger = make_ledger()
    ledger.published(0)
    grant_all(ledger)
    finish(ledger, 3, 1, 2)
    batch = ledger.take(2, ordered=False)
    assert [group.lease.id for group in batch.groups] == [3, 1]
    assert [[t.id for t in group.trajectories] for group in batch.groups] == [[(3, 0), (3, 1)], [(1, 0), (1, 1)]]


def test_first_arrival_wins_and_others_are_counted():
    ledger = make_ledger()
    ledger.published(0)
    grant_all(ledger)
    assert ledger.arrive(trajectory(0, 0, 1.0)) is Outcome.ACCEPTED
    assert ledger.arrive(trajectory(0, 0, 2.0)) is Outcome.DUPLICATE
    assert ledger.fail(0, 0, "reward_error") is Outcome.DUPLICATE
    assert ledger.arrive(trajectory(99, 0)) is Outcome.UNKNOWN_LEASE
    assert ledger.dropped == {"duplicate": 2, "unknown_lease": 1}
    ledger.arrive(trajectory(0, 1, 3.0))
    assert [t.header.reward for t in ledger.ready()[0].trajectories] == [1.0, 3.0]


def test_expired_lease_is_reissued_and_its_first_holder_still_welcome():
    ledger = make_ledger()
    ledger.published(0)
    assert grant_all(ledger, "slow") == [0, 1, 2, 3]
    ledger.progress("slow", [1, 2, 3], 0, now=8.0)
    ledger.expire(now=11.0)
    ledger.published(1)
    reissued = ledger.grant("fast", source, 11.0, 0)
    assert (reissued.id, reissued.version) == (0, 1)
    assert ledger.reissued == 1
    finish(ledger, 0)  # whoever sends it
    assert ledger.progress("fast", [0], 1, now=12.0) == [0], "nothing more is wanted of it"
    assert ledger.progress("slow", [1], 1, now=12.0) == []
    ledger.check()


def test_hello_frees_at_once_what_the_engine_neither_runs_nor_has_spooled():
    ledger = make_ledger()
    ledger.published(0)
    grant_all(ledger, "p")
    ledger.arrive(trajectory(2, 0))
    spooled = [(1, 0), (1, 1), (2, 0), (3, 0)]
    assert ledger.hello("p", running=[0], spooled=spooled, version=0, now=1.0) == [(2, 0)]
    # 0 runs, 1 is all in the spool; 2 and 3 lack a sample each.
    assert grant_all(ledger, "q") == [2, 3]


def test_left_out_groups_give_their_place_back_and_report_their_rewards():
    ledger = make_ledger(max_staleness=0, dynamic_sampling=True)
    ledger.published(0)
    assert grant_all(ledger) == [0, 1]
    for sample in range(GROUP):
        ledger.arrive(trajectory(0, sample, 0.5))
    assert grant_all(ledger) == [2]
    finish(ledger, 1, 2)
    batch = ledger.take(2, ordered=True)
    assert [group.lease.id for group in batch.groups] == [1, 2]
    assert sorted(batch.unfiltered_rewards) == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0] and batch.filtered_groups == 1
    assert ledger.dropped == {"no_signal": GROUP}
    ledger.check()


def test_failed_samples_leave_a_smaller_group_or_none():
    ledger = make_ledger()
    ledger.published(0)
    grant_all(ledger)
    ledger.arrive(trajectory(0, 1, 1.0))
    ledger.fail(0, 0, "reward_error")
    ledger.fail(1, 0, "reward_error")
    ledger.fail(1, 1, "too_long")
    (group,) = ledger.ready()
    assert [t.id for t in group.trajectories] == [(0, 1)] and group.failed == {0: "reward_error"}
    assert grant_all(ledger) == [4], "the lease without a valid sample gave its place back"
    assert ledger.dropped == {"reward_error": 2, "too_long": 1}
    ledger.check()


def test_restored_lease_waits_for_its_engine_and_is_then_granted_to_another():
    ledger = make_ledger()
    ledger.published(0)
    records = [(number, Granted(lease, 0, 0, "p")) for number, lease in enumerate(grant_all(ledger, "p"))]
    again = make_ledger()
    again.restore(LedgerState(), records, source, 100.0, 50)
    again.published(1)
    assert grant_all(again, "q", now=101.0) == []
    again.progress("p", [3], 0, now=105.0)  # p lived on and works on lease 3
    again.expire(now=100.0 + LEASE_SECONDS + 1)
    assert grant_all(again, "q", now=111.0) == [0, 1, 2]
    again.check()


def test_oldest_loaded_version_is_that_of_connected_engines():
    ledger = make_ledger()
    assert ledger.oldest_loaded_version() is None
    ledger.hello("a", [], [], 4, 0.0)
    ledger.hello("b", [], [], -1, 0.0)
    assert ledger.oldest_loaded_version() == -1
    ledger.progress("b", [], 3, 0.0)
    assert ledger.oldest_loaded_version() == 3
    ledger.gone("b")
    assert ledger.oldest_loaded_version() == 4


class LedgerMachine(RuleBasedStateMachine):
    """Random lives of a ledger beside a model that keeps only sets; crashes lose the end of the journal."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.records: list[tuple[int, object]] = []
        self.life()
        self.saved = self.snapshot()

    def life(self) -> None:
        self.ledger = make_ledger(max_staleness=1, dynamic_sampling=True)
        self.publications = self.steps = 0
        self.granted: set[int] = set()
        self.arrived: dict[tuple[int, int], float] = {}
        self.failed: dict[tuple[int, int], str] = {}
        self.consumed: dict[int, str] = {}
        self.batches: list = []

    def snapshot(self) -> tuple:
        state = self.ledger.state(len(self.records))
        mine = set(self.consumed)
        return (
            msgspec.json.encode(state), dict(self.consumed),
            {sample: reward for sample, reward in self.arrived.items() if sample[0] in mine},
            {sample: reason for sample, reason in self.failed.items() if sample[0] in mine},
        )  # fmt: skip

    def record(self, record: object) -> None:
        self.records.append((len(self.records), record))

    def settle(self, lease: int) -> None:
        """The model's own account of a lease that may be complete now."""
        samples = [(lease, sample) for sample in range(GROUP)]
        if all(sample in self.arrived or sample in self.failed for sample in samples):
            rewards = {self.arrived[sample] for sample in samples if sample in self.arrived}
            if len(rewards) < 2:
                self.consumed[lease] = "no_signal"

    @rule()
    def publish(self):
        self.publications += 1
        self.ledger.published(100 + self.publications)

    @rule(producer=st.sampled_from("pq"))
    def grant(self, producer):
        floor = len(self.records)
        lease = self.ledger.grant(producer, source, self.now, floor)
        if lease is None:
            return
        assert lease.id not in self.consumed
        if lease.id not in self.granted:
            self.granted.add(lease.id)
            published = min(self.publications - 1, self.steps + 1)
            held = len(self.granted - self.consumed.keys()) * GROUP
            assert self.steps * BATCH + held <= (1 + published + 1) * BATCH
        self.record(Granted(lease.id, 0, lease.version, producer))

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), sample=st.integers(0, GROUP - 1), reward=st.sampled_from([0.0, 1.0]))
    def arrive(self, data, sample, reward):
        lease = data.draw(st.integers(max(0, max(self.granted) - 8), max(self.granted) + 1))
        outcome = self.ledger.arrive(trajectory(lease, sample, reward))
        if lease not in self.granted:
            assert outcome is Outcome.UNKNOWN_LEASE
        elif lease in self.consumed or (lease, sample) in self.arrived or (lease, sample) in self.failed:
            assert outcome is Outcome.DUPLICATE
        else:
            assert outcome is Outcome.ACCEPTED
            self.arrived[lease, sample] = reward
            self.record(Arrived(lease, sample, encode_trajectory(trajectory(lease, sample, reward))))
            self.settle(lease)

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), sample=st.integers(0, GROUP - 1), reason=st.sampled_from(["reward_error", "too_long"]))
    def fail(self, data, sample, reason):
        lease = data.draw(st.sampled_from(sorted(self.granted)))
        if self.ledger.fail(lease, sample, reason) is Outcome.ACCEPTED:
            assert (lease, sample) not in self.arrived and (lease, sample) not in self.failed
            self.failed[lease, sample] = reason
            self.record(Failed(lease, sample, reason, ""))
            self.settle(lease)

    @rule(seconds=st.floats(0, 2 * LEASE_SECONDS))
    def wait(self, seconds):
        self.now += seconds
        self.ledger.expire(self.now)

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), producer=st.sampled_from("pq"))
    def progress(self, data, producer):
        running = data.draw(st.sets(st.sampled_from(sorted(self.granted)), max_size=4))
        for lease in self.ledger.progress(producer, running, 0, self.now):
            samples = [(lease, sample) for sample in range(GROUP)]
            assert lease in self.consumed or all(s in self.arrived or s in self.failed for s in samples)

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), producer=st.sampled_from("pq"))
    def hello(self, data, producer):
        running = data.draw(st.sets(st.sampled_from(sorted(self.granted)), max_size=3))
        samples = [(lease, sample) for lease in sorted(self.granted) for sample in range(GROUP)]
        spooled = data.draw(st.lists(st.sampled_from(samples), unique=True, max_size=4))
        known = [s for s in spooled if s[0] in self.consumed or s in self.arrived or s in self.failed]
        assert self.ledger.hello(producer, running, spooled, 0, self.now) == known

    @rule(ordered=st.booleans())
    def take(self, ordered):
        batch = self.ledger.take(BATCH // GROUP, ordered)
        if batch is None:
            return
        taken = {group.lease.id for other in self.batches for group in other.groups}
        for group in batch.groups:
            lease = group.lease.id
            assert lease in self.granted and lease not in self.consumed and lease not in taken
            expected = {sample: reward for sample, reward in self.arrived.items() if sample[0] == lease}
            assert {t.id: t.header.reward for t in group.trajectories} == expected
        if ordered:
            ids = [group.lease.id for group in batch.groups]
            assert ids == sorted(self.granted - self.consumed.keys() - taken)[: len(ids)]
        self.batches.append(batch)

    @precondition(lambda self: self.batches)
    @rule()
    def train(self):
        batch = self.batches.pop(0)
        self.ledger.trained(batch)
        self.steps += 1
        for group in batch.groups:
            self.consumed.setdefault(group.lease.id, "")

    @rule(data=st.data())
    def drop(self, data):
        groups = self.ledger.ready() + [group for batch in self.batches for group in batch.groups]
        if groups:
            group = data.draw(st.sampled_from(groups))
            if group.lease.id not in self.consumed:
                assert self.ledger.drop([group], "stale") == [group.lease.id]
                self.consumed[group.lease.id] = "stale"
                self.record(Dropped(group.lease.id, "stale"))

    @rule()
    def checkpoint(self):
        self.saved = self.snapshot()

    @rule(lost=st.integers(0, 4))
    def crash(self, lost):
        """Back to the checkpoint; the last records had not reached the disk."""
        del self.records[len(self.records) - lost :]
        encoded, consumed, arrived, failed = self.saved
        state = msgspec.json.decode(encoded, type=LedgerState)
        self.life()
        self.granted = set(range(state.next_lease))
        self.consumed, self.arrived, self.failed = dict(consumed), dict(arrived), dict(failed)
        for _, record in self.records:
            if record.lease in self.consumed:
                continue
            self.granted |= set(range(record.lease + 1))
            match record:
                case Arrived(lease, sample) if (lease, sample) not in self.failed:
                    reward = dict(enumerate(self.rewards_of(record)))[0]
                    self.arrived.setdefault((lease, sample), reward)
                    self.settle(lease)
                case Failed(lease, sample, reason) if (lease, sample) not in self.arrived:
                    self.failed.setdefault((lease, sample), reason)
                    self.settle(lease)
                case Dropped(lease, reason) if all(
                    (lease, s) in self.arrived or (lease, s) in self.failed for s in range(GROUP)
                ):
                    self.consumed[lease] = reason
        self.ledger.restore(state, iter(self.records), source, self.now, len(self.records))

    @staticmethod
    def rewards_of(record: Arrived) -> list[float]:
        return [msgspec.msgpack.decode(record.frames[0])["reward"]]

    @invariant()
    def every_sample_is_accounted_for(self):
        self.ledger.check()
        trained = [sample for sample in self.arrived if self.consumed.get(sample[0]) == ""]
        assert self.ledger.trained_samples == len(trained)
        dropped = Counter(self.failed.values())
        dropped.update(reason for sample in self.arrived if (reason := self.consumed.get(sample[0])))
        counted = {k: v for k, v in self.ledger.dropped.items() if k not in ("duplicate", "unknown_lease")}
        assert counted == dict(dropped)
        leased = len(self.granted) * GROUP
        assert leased == len(self.arrived) + len(self.failed) + self.ledger.in_flight()


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=80, deadline=None)
