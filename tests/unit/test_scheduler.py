"""The order in which samples start, alone and in the generator."""

import gc
import sys

import numpy as np
import pytest

from drafters.suffix_automaton import SuffixAutomatonDrafter
from pipeline.engine.native.generator import NativeGenerator
from pipeline.engine.native.scheduler import Scheduler
from tests.unit.generation import finish, group, texts
from tests.unit.tiny_models import save_tiny


def started(scheduler, count):
    """(group, sample) of the next ones."""
    order = []
    for _ in range(count):
        sequence = scheduler.next()
        order.append((sequence.request.id, sequence.sample))
        scheduler.start()
    return order


def queue(stagger):
    scheduler = Scheduler(stagger)
    for i in range(3):
        scheduler.add(group(i, samples=3), [5, 5, 5], frozenset())
    return scheduler


def test_groups_start_one_after_the_other():
    assert started(queue(False), 9) == [(g, s) for g in range(3) for s in range(3)]


def test_staggered_groups_send_one_ahead_and_no_place_stays_empty():
    scheduler = queue(True)
    assert started(scheduler, 3) == [(0, 0), (1, 0), (2, 0)]
    scheduler.finished(1)
    assert started(scheduler, 2) == [(1, 1), (1, 2)]
    assert started(scheduler, 1) == [(0, 1)]  # nobody is ahead anywhere, and there is room
    scheduler.finished(2)
    assert scheduler.cancel(0) == [] and started(scheduler, 2) == [(2, 1), (2, 2)]
    assert len(scheduler) == 0 and scheduler.next() is None


def test_a_group_is_known_until_its_last_sample_is_finished_or_it_is_cancelled():
    scheduler = queue(False)
    started(scheduler, 5)
    assert [scheduler.finished(0) for _ in range(3)] == [False, False, True]
    assert 0 not in scheduler and 1 in scheduler and scheduler.groups == [1, 2]
    assert not scheduler.finished(1)
    assert scheduler.cancel(1) == [] and scheduler.cancel(1) == [] and scheduler.cancel(9) == []
    assert scheduler.groups == [2] and len(scheduler) == 3 and not scheduler.waits(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), sharpness=8.0)


def test_staggered_texts_are_the_same_and_drafts_better(folder):
    done, stats = {}, {}
    for stagger in (False, True):
        generator = NativeGenerator(
            folder, drafter=SuffixAutomatonDrafter(), max_sequences=8, stop_token_ids=(), stagger=stagger
        )
        rng = np.random.default_rng(0)
        for i in range(8):
            generator.add(group(i, prompt=rng.integers(3, 60, 8), samples=8, max_new_tokens=40))
        done[stagger], stats[stagger] = texts(finish(generator)), generator.stats()
    assert done[True] == done[False] and len(done[True]) == 64
    assert stats[True].verifications < 0.9 * stats[False].verifications


def calls_of_steps(folder, queued):
    """Calls of Python functions in steps of which some let queued sequences take the place of finished ones."""
    generator = NativeGenerator(folder, max_sequences=4, stop_token_ids=(), stagger=True)
    for i in range(queued):
        generator.add(group(i, samples=2, max_new_tokens=4))
    counts = []
    for _ in range(14):
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            calls += event in ("call", "c_call")

        gc.disable()  # it would call finalizers of what other tests have left
        sys.setprofile(count)
        try:
            generator.step()
        finally:
            sys.setprofile(None)
            gc.enable()
        counts.append(calls)
    return counts[2:]  # the first ones fill caches


def test_a_step_costs_what_is_live_whoever_waits(folder):
    assert calls_of_steps(folder, 10_000) == calls_of_steps(folder, 40)
