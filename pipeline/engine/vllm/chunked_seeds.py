"""Prompts that take more than one pass, together with seeds, on a CPU.

A pass that reads a part of a prompt draws a token like every other, which is thrown away. vLLM 0.32 then turns the
request's random generator back by what a draw of a GPU takes; a CPU's generator has no such offset, and the worker ends
with "CPU Generator does not use offset". Here the generator gets its state from before the draw back, so that the text
of a seed does not depend on how its prompt was cut.
"""

import functools
from typing import Any

import numpy as np


def correct(runner: type) -> None:
    """Puts the correction into `CPUModelRunner`; twice is as good as once."""
    stock_sample, stock_bookkeeping = runner._sample, runner._bookkeeping_sync  # type: ignore[attr-defined]
    if hasattr(stock_sample, "__wrapped__"):
        return

    @functools.wraps(stock_sample)
    def sample(self: Any, *args: Any, **named: Any) -> Any:
        states = {row: generator.get_state() for row, generator in _discarded(self).items()}
        output = stock_sample(self, *args, **named)
        for row, state in states.items():
            self.input_batch.generators[row].set_state(state)
        return output

    @functools.wraps(stock_bookkeeping)
    def bookkeeping(self: Any, *args: Any, **named: Any) -> Any:
        generators, back = self.input_batch.generators, _discarded(self)
        for row in back:
            del generators[row]
        try:
            return stock_bookkeeping(self, *args, **named)
        finally:
            generators.update(back)

    runner._sample, runner._bookkeeping_sync = sample, bookkeeping  # type: ignore[attr-defined]


def _discarded(runner: Any) -> dict[int, Any]:
    """Generators of the rows whose token of this pass is thrown away."""
    generators = runner.input_batch.generators
    if not generators:
        return {}
    rows = np.flatnonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])
    return {row: generators[row] for row in rows.tolist() if row in generators}
