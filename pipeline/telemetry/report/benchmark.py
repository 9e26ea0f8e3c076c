"""The page of a benchmark, from its results.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.telemetry.report.page import MALFORMED, Chart, Page, definitions, table

Row = Mapping[str, Any]


def benchmark_page(path: Path) -> Page:
    """Of any benchmark; one that has curves gets them drawn.

    Raises:
        UsageError: the file is not one that a benchmark wrote.
    """
    try:
        return _page(json.loads(path.read_bytes()))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}; check its permissions") from error
    except MALFORMED as error:
        raise UsageError(f"{path} is not a benchmark's results.json ({error!r}); run the benchmark again") from error


def _page(results: Row) -> Page:
    rows, what = results["rows"], results["what"]
    flat = [_flat({key: value for key, value in row.items() if key != "curves"}) for row in rows]
    labels = _labels(flat)
    numbers = sorted({key for row in flat for key, value in row.items() if _is_number(value)})
    return Page(
        title=f"Rollahead benchmark: {what}",
        subtitle=" ".join(str(results[key]) for key in ("model", "date") if results.get(key)),
        figures=[(key, f"{value:.4g}" if isinstance(value, float) else str(value)) for key, value in _summary(results)],
        charts=[*_arms(rows), *_curves(rows, labels), *_ratios(flat, labels)],
        sections=[
            ("Rows", table(flat)),
            ("Environment", definitions({**results.get("machine", {}), **results.get("versions", {})})),
        ],
        scalars={key: [row.get(key) if _is_number(row.get(key)) else None for row in flat] for key in numbers},
        steps=labels,  # type: ignore[arg-type]
    )


def _summary(results: Row) -> list[tuple[str, Any]]:
    known = {"what", "machine", "versions", "model", "rows", "date"}
    return [(k, v) for k, v in results.items() if k not in known and (isinstance(v, str) or _is_number(v))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flat(row: Row, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= _flat(value, f"{name} ")
        else:
            found[name] = value
    return found


def _labels(rows: Sequence[Row]) -> list[str]:
    """What tells the rows apart, in words; with a number where that is not enough."""
    words = [" ".join(str(v) for k, v in row.items() if isinstance(v, str) or k in ("batch", "seed")) for row in rows]
    return [word if words.count(word) == 1 else f"{number} {word}" for number, word in enumerate(words, 1)]


def _ratios(rows: Sequence[Row], labels: list[str]) -> list[Chart]:
    """Every measure given as median, min and max, with its spread."""
    bases = sorted({key.removesuffix(" median") for row in rows for key in row if key.endswith(" median")})
    charts = []
    for base in bases:
        middle, low, high = ([row.get(f"{base} {part}") for row in rows] for part in ("median", "min", "max"))
        error = {
            "type": "data", "symmetric": False,
            "array": [h - m if m is not None and h is not None else 0 for m, h in zip(middle, high, strict=True)],
            "arrayminus": [m - v if m is not None and v is not None else 0 for m, v in zip(middle, low, strict=True)],
        }  # fmt: skip
        data = [{"x": labels, "y": middle, "type": "bar", "name": base, "error_y": error}]
        charts.append(Chart("spread-" + base.replace(" ", "-"), base, data, {"hovermode": "closest"}))
    return charts


def _curves(rows: Sequence[Row], labels: Sequence[str]) -> list[Chart]:
    """Of rows with `curves` of other benchmarks, name -> values by batch: a chart a name, a line a row."""
    curved = [
        (row["curves"], label)
        for row, label in zip(rows, labels, strict=True)
        if row.get("curves") and "time_split" not in row
    ]
    step = {"xaxis": {"title": {"text": "batch"}}}
    return [
        Chart(
            f"curve-{name}", name,
            [
                {"x": list(range(1, len(curves[name]) + 1)), "y": curves[name], "mode": "lines", "name": label}
                for curves, label in curved
                if name in curves
            ],
            step,
        )
        for name in dict.fromkeys(name for curves, _ in curved for name in curves)
    ]  # fmt: skip


def _arms(rows: Sequence[Row]) -> list[Chart]:
    """Of rows of `end-to-end`: `curves` {"step": [...], "reward": [...], "entropy": [...], "acceptance": [...]}, an arm
    and a seed each, and `time_split`, seconds a step by what was done."""
    curved = [row for row in rows if row.get("curves") and "time_split" in row]
    if not curved:
        return []
    arms = list(dict.fromkeys(row["arm"] for row in curved))
    colour = {arm: f"hsl({int(360 * index / len(arms))},65%,48%)" for index, arm in enumerate(arms)}

    def traces(x: str, y: str, mode: str) -> list[dict[str, Any]]:
        shown: set[str] = set()
        found = []
        for row in curved:
            arm = row["arm"]
            found.append(
                {
                    "x": row["curves"][x], "y": row["curves"][y], "mode": mode, "name": arm, "legendgroup": arm,
                    "showlegend": arm not in shown, "line": {"color": colour[arm]}, "marker": {"color": colour[arm]},
                    "text": [f"{arm}, seed {row['seed']}, step {step}" for step in row["curves"]["step"]],
                }
            )  # fmt: skip
            shown.add(arm)
        return found

    splits = {arm: [row["time_split"] for row in curved if row["arm"] == arm] for arm in arms}
    states = list(dict.fromkeys(state for found in splits.values() for split in found for state in split))
    split = [
        {"x": arms, "y": [sum(s.get(state, 0.0) for s in splits[arm]) / len(splits[arm]) for arm in arms],
         "name": state, "type": "bar"}
        for state in states
    ]  # fmt: skip
    step, entropy = {"xaxis": {"title": {"text": "step"}}}, {"xaxis": {"title": {"text": "entropy, nats a token"}}}
    return [
        Chart("reward", "Reward per step, all arms", traces("step", "reward", "lines"), step,
              "Equal curves at unequal time: speed. Unequal curves: something else changed."),
        Chart("reward-time", "Reward against time", traces("seconds", "reward", "lines"),
              {"xaxis": {"title": {"text": "seconds"}}}),
        Chart("time-split", "Where a step's time goes, seconds", split, {"barmode": "stack", "hovermode": "closest"}),
        Chart("acceptance-entropy", "Acceptance against entropy over training",
              traces("entropy", "acceptance", "markers"), entropy | {"hovermode": "closest"}),
        Chart("acceptance", "Acceptance over training", traces("step", "acceptance", "lines"), step),
    ]  # fmt: skip
