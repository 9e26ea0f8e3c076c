"""The page of a head's training (`rollahead train-drafter`), from what its folder holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.telemetry.report.page import Chart, Page, definitions, text
from pipeline.telemetry.scalars import scalars

SETTINGS = "drafter.toml"
"""the file by which such a folder is known"""
Row = Mapping[str, Any]


def drafter_page(folder: Path, rows: Sequence[Row], settings: Mapping[str, Any], written: str) -> Page:
    """
    Args:
        folder: of the training.
        rows: lines of its metrics.jsonl.
        settings: of its configuration.
        written: the same, as text.
    """
    flat = [scalars(row) for row in rows]
    names = sorted({name for row in flat for name in row} - {"step"})
    section = settings.get("drafter", {})
    return Page(
        title=f"Rollahead draft head {folder.resolve().name}",
        subtitle=f"for {settings.get('model', {}).get('path')}, loss {section.get('loss')}, {rows[-1]['step']} steps",
        figures=_figures(rows),
        charts=[_by_depth(rows), _share(rows), _loss(rows)],
        sections=[
            ("Training", definitions({str(key): value for key, value in section.items()})),
            ("Configuration", f"<pre>{text(written)}</pre>"),
        ],
        scalars={name: [row.get(name) for row in flat] for name in names},
        steps=[row["step"] for row in rows],
    )


def _measured(rows: Sequence[Row]) -> list[Row]:
    """Steps after which acceptance was measured on held-out texts."""
    return [row for row in rows if row.get("held_out_by_depth")]


def _figures(rows: Sequence[Row]) -> list[tuple[str, str]]:
    last, measured = rows[-1], _measured(rows)
    figures = [
        ("steps", str(last["step"])),
        ("time", f"{last['seconds'] / 60:.1f} min"),
        ("loss", f"{last['objective']} {last['loss']:.4f}"),
    ]
    if measured:
        depths = " ".join(f"{alpha:.3f}" for alpha in measured[-1]["held_out_by_depth"])
        figures.append(("held-out acceptance by depth", depths))
        if (share := measured[-1].get("held_out_accepted_share")) is not None:
            figures.append(("of drafted tokens accepted", f"{share:.1%}"))
    return figures


def _by_depth(rows: Sequence[Row]) -> Chart:
    """Held-out acceptance as it is measured, and that of the steps' own batches, thinner."""
    measured = _measured(rows)
    data: list[dict[str, Any]] = []
    for key, found, name, style in (
        ("held_out_by_depth", measured, "held out", {"mode": "lines+markers"}),
        ("acceptance_by_depth", rows, "in training", {"mode": "lines", "opacity": 0.4, "line": {"width": 1}}),
    ):
        for depth in range(max((len(row[key]) for row in found), default=0)):
            y = [row[key][depth] if depth < len(row[key]) else None for row in found]
            data.append({"x": [row["step"] for row in found], "y": y, "name": f"token {depth + 1}, {name}", **style})
    return Chart(
        "depth", "Acceptance by depth", data, {"yaxis": {"range": [0, 1.02]}, "xaxis": {"title": {"text": "step"}}},
        "Chance that a drafted token is accepted where those before it were, at temperature 1.",
    )  # fmt: skip


def _share(rows: Sequence[Row]) -> Chart:
    found = _measured(rows)
    data = [
        {
            "x": [row["step"] for row in found], "y": [row.get("held_out_accepted_share") for row in found],
            "name": "held out", "mode": "lines+markers",
        }
    ]  # fmt: skip
    return Chart(
        "accepted", "Accepted of drafted tokens", data,
        {"yaxis": {"range": [0, 1.02]}, "xaxis": {"title": {"text": "step"}}},
    )  # fmt: skip


def _loss(rows: Sequence[Row]) -> Chart:
    """A curve for each loss: those of a warm-up and of what follows have no common scale."""
    data = []
    for objective in dict.fromkeys(row["objective"] for row in rows):
        own = [row for row in rows if row["objective"] == objective]
        data.append({"x": [r["step"] for r in own], "y": [r["loss"] for r in own], "name": objective, "mode": "lines"})
    return Chart("loss", "Loss", data, {"xaxis": {"title": {"text": "step"}}})
