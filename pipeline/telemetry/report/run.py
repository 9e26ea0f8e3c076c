"""The page of a run, from what its folder holds."""

import json
import statistics
from pathlib import Path
from typing import Any

from pipeline.telemetry.metrics import read_lines
from pipeline.telemetry.report.curves import run_charts
from pipeline.telemetry.report.page import MALFORMED, Page, definitions, table, text
from pipeline.telemetry.report.samples import samples_section
from pipeline.telemetry.scalars import scalars

Row = dict[str, Any]
WINDOW = 10
MOST_SAMPLES = 400


def run_page(folder: Path, rows: list[Row], config: Row, config_text: str) -> Page:
    """Of a run that has finished a step; its configuration, and the same as text."""
    flat = [scalars(row) for row in rows]
    names = sorted({name for row in flat for name in row} - {"step"})
    sections = []
    if samples := _samples(folder / "samples.jsonl"):
        sections.append(("Samples", samples))
    sections.append(("Configuration", f"<pre>{text(config_text)}</pre>"))
    if environment := _environment(folder / "environment.json"):
        sections.append(("Environment", environment))
    if (folder / "trace").is_dir():
        sections.append(
            (
                "Trace",
                "<p>Who waited for whom: open <code>trace.json</code> beside this file in ui.perfetto.dev or "
                "chrome://tracing.</p>",
            )
        )
    sections.append(("Last step", table([_last(rows[-1])])))
    return Page(
        title=f"Rollahead run {folder.resolve().name}",
        subtitle=_subtitle(config, rows),
        figures=_figures(rows),
        charts=run_charts(rows, config),
        sections=sections,
        scalars={name: [row.get(name) for row in flat] for name in names},
        steps=[row["step"] for row in rows],
    )


def _subtitle(config: Row, rows: list[Row]) -> str:
    model = config.get("model", {}).get("path") or "the embedded model"
    task = config.get("task", {})
    drafter = config.get("engine", {}).get("drafter", {}).get("name", "")
    recipe = config.get("objective", {}).get("recipe", "")
    text = f"{model} on {task.get('path') or task.get('kind')}, drafter {drafter}, {rows[-1]['step']} steps"
    return text + (f", recipe {recipe}" if recipe else "")


def _figures(rows: list[Row]) -> list[tuple[str, str]]:
    """What a reader wants first."""
    rewards = [row["reward_mean"] for row in rows if row["reward_mean"] is not None]
    mismatch = [row["mismatch_k3"] for row in rows if row["mismatch_k3"] is not None]
    acceptance = _drafted(rows)
    seconds = sum(row["wall_seconds"] for row in rows)
    evaluations = [row["eval_reward_mean"] for row in rows if row.get("eval_reward_mean") is not None]
    dropped = ", ".join(f"{count} {reason}" for reason, count in rows[-1]["dropped_total"].items()) or "none"
    figures = [("steps", f"{rows[-1]['step']}")]
    if rewards:
        first, last = statistics.fmean(rewards[:WINDOW]), statistics.fmean(rewards[-WINDOW:])
        figures.append(("reward", f"{first:.3f} → {last:.3f}"))
    if evaluations:
        figures.append(("held-out reward", f"{evaluations[0]:.3f} → {evaluations[-1]:.3f}"))
    figures += [
        ("tokens trained", f"{sum(row['tokens_trained'] for row in rows):,}"),
        ("time", f"{seconds / 60:.1f} min"),
        ("tokens/s", f"{sum(row['tokens_trained'] for row in rows) / max(seconds, 1e-9):,.0f}"),
        ("drafts accepted", f"{acceptance:.0%}" if acceptance is not None else "nothing drafted"),
        ("tokens a verification", f"{statistics.fmean(row['tokens_per_verification'] for row in rows):.2f}"),
        ("mismatch k3, median", f"{statistics.median(mismatch):.1e}" if mismatch else "not measured"),
        ("samples dropped", dropped),
    ]
    return figures


def _drafted(rows: list[Row]) -> float | None:
    counts = [counts for row in rows for counts in row["drafters"].values()]
    drafted = sum(count["drafted"] for count in counts)
    return sum(count["accepted"] for count in counts) / drafted if drafted else None


def _thinned(samples: list[Row], most: int) -> list[Row]:
    """Whole steps, evenly spread, with the first and the last."""
    steps = sorted({sample["step"] for sample in samples})
    a_step = len(samples) / len(steps)
    wanted = max(2, int(most / a_step))
    if len(steps) > wanted:
        kept = {steps[round(i * (len(steps) - 1) / (wanted - 1))] for i in range(wanted)}
        samples = [sample for sample in samples if sample["step"] in kept]
    return samples


def _last(row: Row) -> Row:
    return {key: value for key, value in row.items() if not isinstance(value, dict)}


def _samples(path: Path) -> str:
    """Of a file that is damaged, what can be shown, and that it is not all."""
    try:
        samples, damaged = read_lines(path)
        shown = samples_section(_thinned(samples, MOST_SAMPLES)) if samples else ""
    except (OSError, *MALFORMED) as error:
        return _left_out(path, error)
    return shown + (f"<p>{damaged} damaged lines of {path.name} are left out.</p>" if damaged else "")


def _environment(path: Path) -> str:
    try:
        known = json.loads(path.read_bytes())
        return definitions({**known["machine"], **known["versions"]})
    except FileNotFoundError:
        return ""
    except (OSError, *MALFORMED) as error:
        return _left_out(path, error)


def _left_out(path: Path, error: Exception) -> str:
    return f"<p>{path.name} cannot be read and is left out ({text(type(error).__name__)}: {text(error)}).</p>"
