"""What the runs of `bench end-to-end` say: seconds a step, where they went, and whether learning was equal."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.results import spread
from pipeline.errors import RunFailed
from pipeline.telemetry.metrics import read_metrics
from pipeline.telemetry.trace import merge

WARM_UP = 2
"""first steps of a run whose time is not counted: models load, caches and cost models are empty"""
Span = tuple[float, float, str]
"""begin, end, seconds; state"""
NAMES = {
    "generating": "generation", "transport": "transport", "loading weights": "weight update",
    "waiting for weights": "weight update", "learning": "learning", "publishing weights": "weight update",
    "evaluating": "evaluation", "writing": "writing",
}  # fmt: skip


def run_row(folder: Path, arm: str, seed: int, target: float) -> dict[str, Any]:
    """The row of one run.

    Raises:
        RunFailed: it has no steps.
    """
    rows = read_metrics(folder / "metrics.jsonl")
    if len(rows) <= WARM_UP:
        raise RunFailed(f"{folder} has {len(rows)} steps, of which the first {WARM_UP} are not counted; run more")
    counted = rows[WARM_UP:]
    seconds = [step_seconds(row) for row in rows]
    elapsed = [sum(seconds[: n + 1]) for n in range(len(rows))]
    reached = (t for t, row in zip(elapsed, rows, strict=True) if (row.get("eval_reward_mean") or 0.0) >= target)
    evaluations = [row["eval_reward_mean"] for row in rows if row.get("eval_reward_mean") is not None]
    acceptance = [row["acceptance_rate"] for row in counted if row["acceptance_rate"] is not None]
    return {
        "arm": arm,
        "seed": seed,
        "steps": len(rows),
        "step_seconds": spread(seconds[WARM_UP:]),
        "mean_step_seconds": fmean(seconds[WARM_UP:]),
        "seconds_to_target": next(reached, None),
        "reward_last": fmean(row["reward_mean"] for row in rows[-5:]),
        "held_out_reward_last": evaluations[-1] if evaluations else None,
        "tokens_per_second": sum(row["tokens_trained"] for row in counted) / sum(seconds[WARM_UP:]),
        "acceptance_rate": fmean(acceptance) if acceptance else None,
        "tokens_per_verification": fmean(row["tokens_per_verification"] for row in counted),
        "tail": fmean(row["response_length_max"] / max(1.0, row["response_length_mean"]) for row in counted),
        "staleness": fmean(row["staleness_mean"] for row in counted),
        "time_split": time_split(counted, _spans(folder)),
        "curves": {
            "step": [row["step"] for row in rows],
            "seconds": elapsed,
            "reward": [row["reward_mean"] for row in rows],
            "entropy": [row["entropy"] for row in rows],
            "acceptance": [row["acceptance_rate"] for row in rows],
        },
    }


def step_seconds(row: Mapping[str, Any]) -> float:
    """Of a step without the evaluation in it: that costs every arm the same and is not training."""
    return float(row["wall_seconds"] - row["learner_time"].get("evaluating", 0.0))


def time_split(rows: Sequence[Mapping[str, Any]], spans: Mapping[str, Sequence[Span]]) -> dict[str, float]:
    """Seconds a step of the learner by what it did or what it waited for.

    What it waited for is what engines did meanwhile, by the traces of both. Rewards are computed beside the engine's
    main thread: they take the place of waiting in which nothing else was done.
    """
    split: dict[str, float] = defaultdict(float)
    for row in rows:
        for state, seconds in row["learner_time"].items():
            if state not in ("waiting for samples", "starting", "evaluating"):
                split[NAMES.get(state, state)] += seconds
    waited = sum(row["learner_time"].get("waiting for samples", 0.0) for row in rows)
    for state, share in shares_of_waiting(spans).items():
        split[NAMES.get(state, "waiting")] += share * waited
    reward = min(split.get("waiting", 0.0), sum(row["engine_time"].get("reward", 0.0) for row in rows))
    if reward:
        split["reward"] = reward
        split["waiting"] -= reward
    return {name: seconds / len(rows) for name, seconds in split.items()}


def shares_of_waiting(spans: Mapping[str, Sequence[Span]]) -> dict[str, float]:
    """What engines did while the learner waited for samples, as shares that add up to 1; all of it is `waiting` where
    there are no traces."""
    waits = [(begin, end) for begin, end, state in spans.get("learner", ()) if state == "waiting for samples"]
    found: dict[str, float] = defaultdict(float)
    for begin, end, state in spans.get("engine", ()):
        found[state] += sum(max(0.0, min(end, stop) - max(begin, start)) for start, stop in _near(waits, begin, end))
    total = sum(found.values())
    return {state: seconds / total for state, seconds in found.items()} if total else {"waiting": 1.0}


def _near(waits: Sequence[tuple[float, float]], begin: float, end: float) -> Iterable[tuple[float, float]]:
    return (wait for wait in waits if wait[1] > begin and wait[0] < end)


def _spans(folder: Path) -> dict[str, list[Span]]:
    """By process name."""
    events = merge((folder / "trace").glob("*.json"))
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    found: dict[str, list[Span]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            begin = event["ts"] / 1e6
            found[names.get(event["pid"], "")].append((begin, begin + event["dur"] / 1e6, event["name"]))
    return found


def compare(rows: Sequence[Mapping[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Arms against the baseline, seed by seed.

    `ratio` is the baseline's median step time over the arm's; `reward_gap` the arm's reward minus the baseline's, mean
    over steps and seeds; `reward_noise` how far apart two seeds of the baseline are by the same measure (0 with one).
    """
    by_arm: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        by_arm[row["arm"]][row["seed"]] = row
    base = by_arm[baseline]
    noise = [abs(_gap(a, b)) for s, a in base.items() for t, b in base.items() if s < t]
    return [
        {
            "arm": arm,
            "step_seconds": spread(row["step_seconds"]["median"] for row in found.values()),
            "ratio": spread(
                base[seed]["step_seconds"]["median"] / row["step_seconds"]["median"] for seed, row in found.items()
            ),
            "reward_gap": fmean(_gap(row, base[seed]) for seed, row in found.items()),
            "reward_noise": median(noise) if noise else 0.0,
            "seconds_to_target": [row["seconds_to_target"] for row in found.values()],
        }
        for arm, found in by_arm.items()
    ]


def _gap(row: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Mean over steps of a reward minus another."""
    return fmean(a - b for a, b in zip(row["curves"]["reward"], other["curves"]["reward"], strict=False))
