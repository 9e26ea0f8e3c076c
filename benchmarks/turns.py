"""Several generators in short turns, so that what slows a machine down for a second slows all of them."""

import time
from collections.abc import Sequence

from pipeline.engine.generator import FinishedSample, Generator

TURN_SECONDS = 0.05


def take_turns(generators: Sequence[Generator]) -> list[tuple[float, list[FinishedSample]]]:
    """Runs every generator until it has no work left.

    Returns:
        For each the seconds of its own turns, and what it finished.
    """
    seconds = [0.0] * len(generators)
    finished: list[list[FinishedSample]] = [[] for _ in generators]
    forwards = False
    while working := [index for index, generator in enumerate(generators) if generator.has_work()]:
        forwards = not forwards
        for index in working if forwards else reversed(working):
            began = time.perf_counter()
            while generators[index].has_work() and time.perf_counter() - began < TURN_SECONDS:
                finished[index] += generators[index].step()
            seconds[index] += time.perf_counter() - began
    return list(zip(seconds, finished, strict=True))
