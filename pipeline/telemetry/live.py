"""The live view of a run, a learner or an engine: 80 columns of a terminal, elsewhere plain lines."""

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from pipeline.telemetry.progress import bar, line, number, sparkline

COLOURS = ("green", "yellow", "magenta", "blue", "red")
"""of drafters, in the order in which each is first met"""
BONUS = "cyan"
COLUMNS = 80
SAMPLE_TOKENS = 320
"""characters of a response that are shown"""


class Screen:
    """A terminal that is redrawn, or lines one below the other."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr)
        self.live = self.console.is_terminal
        self._live: Live | None = None

    def draw(self, content: RenderableType) -> None:
        if self._live is None:
            self._live = Live(console=self.console, refresh_per_second=4, vertical_overflow="crop")
            self._live.start()
        self._live.update(content)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class RunView:
    """Step by step, from the lines of metrics.jsonl and samples.jsonl."""

    def __init__(self, steps: int, done: int, console: Console | None = None) -> None:
        self._screen = Screen(console)
        self.steps = steps
        self._rewards: deque[float] = deque(maxlen=400)
        self._warnings: deque[str] = deque(maxlen=3)
        self._samples: dict[int, Mapping[str, Any]] = {}
        self._names: list[str] = []
        self._progress: Progress = bar(self._screen.console, "training")
        self._task = self._progress.add_task("training", total=steps, completed=done)
        if self._screen.live:
            self._screen.draw(Group(Text("waiting for the first step", style="dim"), self._progress))

    def show(self, row: Mapping[str, Any]) -> None:
        """One finished step."""
        self._rewards.append(row["reward_mean"] or 0.0)
        if not self._screen.live:
            self._screen.say(line(row, self.steps))
            return
        self._progress.update(self._task, completed=row["step"])
        self._screen.draw(Group(*self._parts(row), self._progress))

    def sample(self, sample: Mapping[str, Any]) -> None:
        """A line of samples.jsonl; drawn with the next step. The last two are kept."""
        self._samples[sample["lease"]] = sample
        while len(self._samples) > 2:
            del self._samples[next(iter(self._samples))]

    def warn(self, text: str) -> None:
        """Something a person should know; stays on the screen."""
        self._warnings.append(text)
        if not self._screen.live:
            self._screen.say(text)

    def close(self) -> None:
        self._screen.close()

    def _parts(self, row: Mapping[str, Any]) -> list[RenderableType]:
        parts: list[RenderableType] = [_table(step_lines(row, list(self._rewards)))]
        parts += [sample_text(sample, self._names) for sample in self._samples.values()]
        parts += [Text(text, style="red", overflow="ellipsis", no_wrap=True) for text in self._warnings]
        return parts


class EngineView:
    """Of an engine that has a terminal of its own; without one, a line a minute."""

    EVERY = 60
    """seconds between lines"""

    def __init__(self, console: Console | None = None) -> None:
        self._screen = Screen(console)
        self._calls = 0

    def show(self, row: Mapping[str, Any]) -> None:
        """Called once a second."""
        self._calls += 1
        if self._screen.live:
            self._screen.draw(_table(engine_lines(row), row.get("said", ())))
        elif self._calls % self.EVERY == 0:
            self._screen.say("  ".join(f"{name} {text}" for name, text in engine_lines(row)))

    def close(self) -> None:
        self._screen.close()


def _table(lines: Sequence[tuple[str, str]], said: Sequence[str] = ()) -> Table:
    """Names and values in 80 columns; below them what the process said last."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=10)
    table.add_column(max_width=COLUMNS - 11, overflow="ellipsis", no_wrap=True)
    for name, text in lines:
        table.add_row(Text(name, style="bold"), Text(text))
    for text in said:
        table.add_row(Text("said", style="bold"), Text(text, style="red" if "warning" in text.lower() else "dim"))
    return table


def step_lines(row: Mapping[str, Any], rewards: Sequence[float]) -> list[tuple[str, str]]:
    """What is said of a step: (name, at most 69 characters)."""
    samples, dropped = row["samples"], row["dropped_total"]
    acceptance = row["acceptance_rate"]
    accepted = f", {acceptance:.0%} of drafts accepted" if acceptance is not None else ", nothing drafted"
    lost = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
    return [
        ("reward", f"{number(row['reward_mean'], '.3f')}  {sparkline(list(rewards))}"),
        ("speed", f"{number(row['tokens_per_second'], ',.0f')} tokens/s, {row['engines']} engine(s)"),
        ("drafting", f"{number(row['tokens_per_verification'], '.2f')} tokens a verification{accepted}"),
        ("drafters", _drafters(row["drafters"])),
        ("queue", f"{samples.get('in_flight', 0)} generating, {samples.get('buffered', 0)} waiting; dropped: {lost}"),
        (
            "version",
            f"v{row['policy_version']}, tokens {number(row['staleness_mean'], '.2f')} publications old, "
            f"at most {number(row['staleness_max'], '.0f')}",
        ),
        ("entropy", f"{number(row['entropy'], '.3f')} nats a token, ESS {number(row['importance_weight_ess'], '.2f')}"),
        ("learner", _shares(row.get("learner_time", {}))),
        ("engines", _shares(row.get("engine_time", {}))),
    ]


def engine_lines(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is said of an engine."""
    newest, queue = row["newest_version"], row["queue"]
    return [
        (
            "version",
            f"v{row['policy_version']}{f', v{newest} is there' if newest > row['policy_version'] else ''}, tokens "
            f"{number(row['staleness_mean'], '.2f')} publications old, at most {number(row['staleness_max'], '.0f')}",
        ),
        ("speed", f"{row['tokens_per_second']:,.0f} tokens/s, {row['generated_tokens_total']:,} in all"),
        ("work", f"{row['sequences']} sequences of {row['leases']} leases, {row['samples_total']} samples done"),
        ("queue", f"{queue['waiting']} leases to begin, {queue['scoring']} waiting for rewards"),
        ("drafting", f"{row['tokens_per_verification']:.2f} tokens a verification"),
        ("drafters", _drafters(row["drafters"])),
        ("time", _shares(row["seconds"])),
    ]


def sample_text(sample: Mapping[str, Any], names: list[str]) -> Text:
    """A sample with accepted drafts in their drafter's colour; the last characters of a long one."""
    text = Text()
    for piece, origin, drafter, sampler, _ in sample["pieces"]:
        if drafter is not None and drafter not in names:
            names.append(drafter)
        style = f"bold {COLOURS[names.index(drafter) % len(COLOURS)]}" if drafter is not None else ""
        if origin == "bonus":
            style = BONUS
        text.append(piece.replace("\n", "⏎"), style=style + (" underline" if sampler != "policy" else ""))
    if len(text) > SAMPLE_TOKENS:
        text = Text("…") + text[len(text) - SAMPLE_TOKENS :]
    question = sample["prompt"].strip().replace("\n", "⏎")
    head = Text(f"sample {sample['reward']:+.2f} ", style="bold") + Text(f"{question[-50:]} → ", style="dim")
    return head + text


def _drafters(drafters: Mapping[str, Mapping[str, int]]) -> str:
    drafted = sum(counts["drafted"] for counts in drafters.values())
    if not drafted:
        return "none drafted"
    return ", ".join(
        f"{name} {counts['drafted'] / drafted:.0%} of drafts, {counts['accepted'] / max(1, counts['drafted']):.0%} kept"
        for name, counts in drafters.items()
    )


def _shares(seconds: Mapping[str, float]) -> str:
    total = sum(value for state, value in seconds.items() if state != "reward")
    if total <= 0:
        return "-"
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{state} {value / total:.0%}" for state, value in ordered if value >= 0.005 * total)
