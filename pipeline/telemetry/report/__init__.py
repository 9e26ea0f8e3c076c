"""`rollahead report DIR`: one HTML file that needs no network, of a run, a draft head's training or a benchmark."""

import tomllib
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.telemetry.metrics import read_lines
from pipeline.telemetry.report.benchmark import benchmark_page
from pipeline.telemetry.report.drafter import SETTINGS, drafter_page
from pipeline.telemetry.report.page import MALFORMED, Page, render
from pipeline.telemetry.report.run import run_page
from pipeline.telemetry.trace import merge

__all__ = ["write_report"]


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Reads what a run, a head's training or a benchmark left in `folder` and writes report.html; of a run also
    trace.json, its processes' traces in one file.

    Raises:
        UsageError: there is nothing to report on, or the file cannot be written.
    """
    metrics, results = folder / "metrics.jsonl", folder / "results.json"
    try:
        rows, damaged = read_lines(metrics)
    except OSError as error:
        raise UsageError(f"{metrics} cannot be read: {error}; check its permissions") from error
    if not rows and not results.exists():
        raise UsageError(
            f"{folder} holds neither a run, nor a head's training, that has finished a step (metrics.jsonl), nor a "
            "benchmark (results.json); give the --out of one"
        )
    page = _page(folder, rows) if rows else benchmark_page(results)
    if damaged:
        page.figures.append(("damaged lines of metrics.jsonl, left out", str(damaged)))
    out = out or folder / "report.html"
    try:
        out.write_text(render(page), encoding="utf-8")
        if rows and (folder / "trace").is_dir():
            _write_trace(folder)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error}; choose another --out") from error
    return out


def _page(folder: Path, rows: list[dict[str, Any]]) -> Page:
    of_head = (folder / SETTINGS).exists()
    path = folder / (SETTINGS if of_head else "config.toml")
    try:
        written = path.read_text()
        settings = tomllib.loads(written)
    except FileNotFoundError:
        written, settings = "", {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read: {error}; copy it again, or take it away to report without it"
        ) from error
    try:
        return (drafter_page if of_head else run_page)(folder, rows, settings, written)
    except MALFORMED as error:
        raise UsageError(
            f"{folder / 'metrics.jsonl'} is not what this version writes ({type(error).__name__}: {error}); "
            "report with the version that wrote it"
        ) from error


def _write_trace(folder: Path) -> None:
    import json

    text = ",\n".join(json.dumps(event) for event in merge((folder / "trace").glob("*.json")))
    (folder / "trace.json").write_text(f"[{text}]\n")
