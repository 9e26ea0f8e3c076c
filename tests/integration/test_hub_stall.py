"""A run is taken for stalled when engines have been asked for samples and none came, and for no other reason."""

import time

import pytest
from msgspec import structs

from benchmarks.synthetic import BATCH, GROUP, make_link, source, trajectory
from learner.evaluation import EVAL_LEASES
from learner.stall import Loneliness, dump_state
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
        said = dump_state(tmp_path / "stalled.txt", hub.describe())
        text = (tmp_path / "stalled.txt").read_text()
        assert said == f"{tmp_path}/stalled.txt says who holds what"
        assert "lease 0: open, held by " in text and "samples [0, 1, 2, 3] have not come" in text
        assert "of 32 samples leased 0 are trained, 0 dropped, 0 wait for a batch, 32 have not come" in text
        assert "thread MainThread" in text and "heard 0." in text
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


def test_a_learner_without_engines_says_so_now_and_then(tmp_path):
    lines = []
    with running_hub(tmp_path) as hub:
        loneliness = Loneliness(lines.append, hub, 0.0)
        for second in range(400):
            loneliness.look(0, second)
        assert [line.partition(" s;")[0] for line in lines] == [f"no engine for {s}" for s in (30, 60, 120, 240)]
        assert hub.address in lines[0]
        loneliness.look(1, 400)
        loneliness.look(0, 429)
        assert len(lines) == 4, "one was there"


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
