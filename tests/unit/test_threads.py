"""CPU time of threads is theirs, not their neighbours'."""

import threading
import time

import pytest

from pipeline.telemetry.threads import cpu_seconds


def test_only_the_threads_that_are_named_are_counted():
    stop, busy = threading.Event(), threading.Event()

    def spin() -> None:
        began = time.thread_time()
        while time.thread_time() - began < 0.2:
            pass
        busy.set()
        stop.wait()

    working = threading.Thread(target=spin, name="working")
    idle = threading.Thread(target=stop.wait, name="idle")
    working.start()
    idle.start()
    assert busy.wait(60)
    try:
        counted = cpu_seconds(("working",), "no such library")
        if counted is None:
            pytest.skip("only Linux tells")
        assert 0.2 <= counted < 0.4
        assert (cpu_seconds(("idle",), "no such library") or 0.0) < 0.1
        both = cpu_seconds(("idle", "working"), "no such library")
        assert both is not None and both >= counted
    finally:
        stop.set()
        working.join()
        idle.join()
