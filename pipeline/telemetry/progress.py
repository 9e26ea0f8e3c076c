"""Progress for people: rich on a terminal, plain lines elsewhere."""

import itertools
import sys
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from pipeline.stop import StopSignal

SPARKS = "▁▂▃▄▅▆▇█"


def line(row: Mapping[str, Any], steps: int) -> str:
    """A step in one plain line."""
    acceptance = row["acceptance_rate"]
    drafting = f"accepted {acceptance:.0%}" if acceptance is not None else "no drafts"
    return (
        f"step {row['step']}/{steps}  reward {number(row['reward_mean'], '.3f')}  "
        f"{number(row['tokens_per_second'], '.0f')} tokens/s  {drafting}  "
        f"{number(row['tokens_per_verification'], '.2f')} tokens/verification  "
        f"staleness {number(row['staleness_mean'], '.2f')}  entropy {number(row['entropy'], '.3f')}"
    )


def number(value: float | None, form: str) -> str:
    """A metric that was not measured is a dash."""
    return "-" if value is None else format(value, form)


def sparkline(values: list[float], width: int = 40) -> str:
    """Means of equal stretches of `values`, as block characters between 0 and the largest."""
    if not values:
        return ""
    width = min(width, len(values))
    bounds = [round(index * len(values) / width) for index in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    top = max(max(means), 1e-9)
    return "".join(SPARKS[min(len(SPARKS) - 1, int(max(mean, 0.0) / top * (len(SPARKS) - 1)))] for mean in means)


class WarmStartState(Protocol):
    """What `learner.warm_start` reports once a step."""

    @property
    def fraction(self) -> float: ...
    @property
    def step(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def reward(self) -> float: ...
    @property
    def seconds(self) -> float: ...
    @property
    def message(self) -> str: ...


class WarmStartView:
    """The supervised warm start of the embedded model."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr)
        self._shown, self._said = -1, ""
        self._progress: Progress | None = None

    def __enter__(self) -> "WarmStartView":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, now: WarmStartState, stop: StopSignal) -> None:
        """One step of it.

        Raises:
            KeyboardInterrupt: a stop was asked for; nothing of a warm start that is not finished is kept.
        """
        if stop.requested:
            raise KeyboardInterrupt
        if self.console.is_terminal:
            self._draw(now.fraction, now.reward)
        elif now.step and int(now.fraction * 10) > self._shown and not now.message:
            self._shown = int(now.fraction * 10)
            self._print(
                f"warm start {now.fraction:4.0%}  loss {now.loss:.3f}  reward {now.reward:.2f}  {now.seconds:.0f} s"
            )
        if now.message and now.message != self._said:
            self._said = now.message
            self._print(now.message)

    def _draw(self, fraction: float, reward: float) -> None:
        if self._progress is None:
            self._progress = bar(self.console, "warm start", TextColumn("reward {task.fields[reward]}"))
            self._task = self._progress.add_task("warm start", total=1.0, reward="-")
            self._progress.start()
        self._progress.update(self._task, completed=fraction, reward=f"{reward:.2f}")

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def bar(console: Console, name: str, *extra: ProgressColumn) -> Progress:
    """A bar with its share and the time passed."""
    columns = (TextColumn(name), BarColumn(), TextColumn("{task.percentage:.0f}%"), *extra, TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)
