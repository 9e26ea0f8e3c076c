"""Evaluation through real sockets: granted first, answered at once, not journaled, not trained."""

from msgspec import structs

from benchmarks.synthetic import GROUP, make_link, source, trajectory
from learner.evaluation import EVAL_LEASES
from pipeline.engine.link import Granted
from tests.integration.running import eventually, running_hub, wait_for


def eval_leases(count):
    return [structs.replace(source(i, 0), id=EVAL_LEASES + i, kind="eval") for i in range(count)]


def test_evaluation_leases_come_first_and_leave_no_trace_in_training(tmp_path):
    with running_hub(tmp_path) as hub:
        hub.begin_evaluation(eval_leases(2))
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        link.update((), 2 * GROUP, 0, 0, 0.0)
        granted = wait_for(link, Granted).leases
        assert [lease.kind for lease in granted] == ["eval", "eval"]
        assert hub.evaluated(0.05) is None
        link.update([lease.id for lease in granted], 0, 0, 0, 0.0)
        for lease in granted:
            for sample in range(GROUP - 1):
                link.submit(trajectory(lease, sample))
            link.fail_sample(lease.id, GROUP - 1, "reward_error", "on purpose")
        evaluation = hub.evaluated(10.0)
        assert evaluation is not None and evaluation.missing == 0
        assert evaluation.metrics(1.0)["eval_failed"] == 2
        eventually(lambda: link.stats().spooled == link.stats().queued == 0)
        stats = hub.stats()
        assert stats.buffered == 0 and stats.trained_samples == 0 and not any(stats.dropped.values())
        hub.check()
        link.stop()
    kept = b"".join(path.read_bytes() for path in (tmp_path / "journal").rglob("*") if path.is_file())
    assert b"prompt" not in kept and b"reward_error" not in kept


def test_a_sample_of_another_publication_is_not_evaluated(tmp_path):
    with running_hub(tmp_path) as hub:
        hub.publish(1)
        hub.begin_evaluation(eval_leases(1))
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        link.submit(trajectory(eval_leases(1)[0], 0, 1))
        eventually(lambda: hub.stats().bad_messages == 1)
        assert hub._reception.evaluation.missing == GROUP
        link.stop()


def test_a_sample_of_an_evaluation_that_is_over_is_forgotten(tmp_path):
    with running_hub(tmp_path) as hub:
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        lease = eval_leases(1)[0]
        link.submit(trajectory(lease, 0))
        eventually(lambda: link.stats().spooled == link.stats().queued == 0)
        assert hub.stats().buffered == 0
        link.stop()
