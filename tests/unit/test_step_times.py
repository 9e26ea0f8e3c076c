"""What steps take beside verification."""

import pytest

from drafters.step_times import StepTimes


def stepped(times, clock, before, after, verification, told=None):
    """One step: so long before it is proposed for, and between that and its observation beside its verification."""
    clock[0] += before
    times.proposing()
    clock[0] += 5.0  # its own
    times.left()
    clock[0] += after + verification
    times.observing(verification if told is None else told)
    clock[0] += 7.0  # its own
    times.done()


def test_what_is_in_neither_is_beside():
    clock = [3.0]
    times = StepTimes(lambda: clock[0])
    for _ in range(4000):
        stepped(times, clock, 0.25, 0.5, 2.0)
    assert times.beside == pytest.approx(0.75, rel=0.01) and times.undecided == times.decided == times.beside


def test_pauses_unknown_times_and_steps_in_which_sequences_come_or_go_are_left_out():
    clock = [0.0]
    times = StepTimes(lambda: clock[0])
    stepped(times, clock, 50.0, 50.0, 1.0)
    assert times.beside == 0, "nothing is known of what went before the first step"
    for _ in range(1000):
        stepped(times, clock, 0.1, 0.1, 1.0)
    usual = times.beside
    times.disturb()
    stepped(times, clock, 50.0, 50.0, 1.0)
    stepped(times, clock, 50.0, 50.0, 1.0, told=0.0)
    assert times.beside == usual
    stepped(times, clock, 50.0, 50.0, 1.0)
    assert usual < times.beside < 1.11 * usual


def test_own_times_add_up():
    times = StepTimes(lambda: 0.0)
    for _ in range(5000):
        times.has_decided(0.03)
        times.has_learnt(0.01)
    assert times.own == times.decided == pytest.approx(0.04, rel=0.01) and times.undecided == pytest.approx(
        0.01, rel=0.01
    )
