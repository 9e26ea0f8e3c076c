"""A main loop that hangs is found, and the report says where."""

import threading
import time

from pipeline.watchdog import Watchdog


def hang_here(seconds: float) -> None:
    time.sleep(seconds)


def test_a_hanging_loop_is_reported_once_with_its_place():
    reports = []
    watchdog = Watchdog(0.2, lambda why, where: reports.append((why, where)))
    for _ in range(6):
        time.sleep(0.05)
        watchdog.beat()
    assert reports == []
    hang_here(0.6)
    ((why, where),) = reports
    assert "no progress" in why and "stall_seconds" in why
    assert "hang_here" in where.rpartition("thread MainThread")[2]


def test_no_limit_means_no_thread():
    before = threading.active_count()
    Watchdog(0, lambda why, where: None).beat()
    assert threading.active_count() == before
