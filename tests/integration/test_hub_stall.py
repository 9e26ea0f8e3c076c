"""A run is taken for stalled when engines have been asked for samples and none came, and for no other reason."""

import time

import pytest
from msgspec import structs

from benchmarks.synthetic import BATCH, GROUP, make_link, source, trajectory
from learner.evaluation import EVAL_LEASES
from pipeline.engine.link import Granted
from tests.integration.running import GROUPS, eventually, running_hub, wait_for

PAUSE = 1.0


def test_an_engine_that_comes_late_has_its_time(tmp_path):
    with running_hub(tmp_path) as hub:
        time.sleep(PAUSE)
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        link.update((), BATCH, 0, 0, 0.0)
        eventually(lambda: hub.stats().in_flight > 0)
        assert hub.stalled_seconds() < PAUSE / 2
        time.sleep(PAUSE / 2)
        assert hub.stalled_seconds() >= PAUSE / 2, "it was asked, and sends nothing"
        link.stop()


def test_engines_that_come_back_have_their_time_again(tmp_path):
    with running_hub(tmp_path) as hub:
        for producer in ("one", "two"):
            link = make_link(hub.address, tmp_path / producer)
            link.start()
            link.update((), BATCH, 0, 0, 0.0)
            eventually(lambda: hub.stats().engines == 1 and hub.stats().in_flight > 0)
            assert hub.stalled_seconds() < PAUSE / 2
            link.stop()
            eventually(lambda: hub.stats().engines == 0)
            assert hub.stalled_seconds() == 0.0
            time.sleep(PAUSE)


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_step_in_which_nothing_is_asked_for_is_no_stall(tmp_path, evaluates):
    with running_hub(tmp_path, ledger={"max_staleness": 0}) as hub:
        link = make_link(hub.address, tmp_path / "spool")
        link.start()
        link.update((), BATCH, 0, 0, 0.0)
        for lease in wait_for(link, Granted).leases:
            for sample in range(GROUP):
                link.submit(trajectory(lease, sample))
        batch = hub.take(GROUPS, ordered=True, timeout=10.0)
        assert batch is not None and hub.stats().in_flight == 0
        time.sleep(PAUSE)  # the step
        assert hub.stalled_seconds() == 0.0
        if evaluates:
            hub.begin_evaluation([structs.replace(source(0, 0), id=EVAL_LEASES, kind="eval")])
        else:
            hub.trained(batch)
            hub.publish(1)
            eventually(lambda: hub.stats().in_flight > 0)
        assert hub.stalled_seconds() < PAUSE / 2
        link.stop()
