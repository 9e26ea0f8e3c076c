"""Training on compressed rollouts, corrected and not, against the full cache: held-out reward after equal steps.

Every arm has the recipe `sparse-rl`; "uncorrected" leaves out its corrections. The policy is evaluated with the full
cache. What counts as equivalent is `--margin`, stated before anything runs.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.held_out import HeldOut, check_apart
from benchmarks.plots import training_curves
from benchmarks.results import earlier_rows, write_results
from benchmarks.sparse import held_out_settings
from benchmarks.stale_training import train
from benchmarks.student import margin_95
from pipeline.config import Config, check_config, load_config
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError

KEPT = (
    "reward_mean", "entropy", "grad_norm", "importance_weight_ess", "compressed/k3", "compressed/fraction",
    "icepop/below_fraction", "icepop/above_fraction", "veto/vetoed_samples",
)  # fmt: skip
PLOTTED = {"reward_mean": "reward of the rollouts", "compressed/k3": "k3, dense policy against sampler"}
WHAT = "sparse-training"
CONFIDENCE = 0.9
"""of the intervals: two one-sided tests at 5% each"""


def compare(options: argparse.Namespace) -> int:
    """Trains every arm with every seed, prints verdicts, writes `results.json` and a plot; the exit code."""
    if options.seeds < 2:
        raise UsageError(f"--seeds {options.seeds} gives no interval; use at least 2")
    check_apart(options.prompts, options.train)
    print(f"equivalent: {CONFIDENCE:.0%} interval of the difference of held-out rewards within {options.margin}")
    arms = [("full", "", 0)]
    arms += [
        (kind, policy, budget)
        for policy in options.policies
        for budget in options.budgets
        for kind in ("corrected", "uncorrected")
    ]
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("out", "runs", "seeds")}
    rows = earlier_rows(options.out, WHAT, settings)
    known = {(row["arm"], row["policy"], row["budget"], row["seed"]) for row in rows}
    runs = [(*arm, seed) for seed in range(options.seed, options.seed + options.seeds) for arm in arms]
    for kind, policy, budget, seed in [run for run in runs if run not in known][: options.runs or None]:
        rows.append(_run(options, kind, policy, budget, seed))
        row = rows[-1]
        print(
            f"seed {seed}  {kind:<12} {policy:<13} {budget:>4}  held-out reward {row['held_out_before']:.3f} ->"
            f" {row['held_out_after']:.3f}  {row['seconds']:.0f} s",
            flush=True,
        )
        # After every run: what hours have brought is not lost with a machine.
        write_results(options.out, WHAT, rows, model=str(options.model), seed=options.seed, settings=settings)
    if len(rows) < len(runs):
        print(f"{len(rows)} of {len(runs)} runs are done; the same command goes on")
        return 0
    verdicts = [line for _, policy, budget in arms[1::2] for line in verdicts_of(rows, policy, budget, options.margin)]
    path = write_results(
        options.out, WHAT, rows, model=str(options.model), seed=options.seed, settings=settings, verdicts=verdicts,
        confidence=CONFIDENCE,
    )  # fmt: skip
    plot = training_curves(options.out / f"{WHAT}.png", [(_name(row), row["curves"]) for row in rows], PLOTTED)
    print("\n".join(["", *verdicts, "", f"written {path}" + (f" and {plot}" if plot else "")]))
    return 0


def _run_config(options: argparse.Namespace, kind: str, policy: str, budget: int, seed: int) -> Config:
    settings = [
        *held_out_settings(options), f"run.steps={options.steps}", f"run.seed={seed}", "objective.recipe=sparse-rl",
        f"learner.learning_rate={options.learning_rate}", f"learner.batch_size={options.batch_size}",
        f"engine.max_sequences={options.batch_size}", "engine.drafter=none", f"learner.dtype={options.dtype}",
        f"sampling.temperature={options.temperature}",
    ]  # fmt: skip
    if kind == "uncorrected":
        settings.append("objective.corrections=[]")
    if policy:
        settings += [
            f"engine.kv_compression.policy={policy}",
            f"engine.kv_compression.budget={budget}",
            f"engine.kv_compression.every={options.every}",
        ]
    config = load_config(None, settings)
    check_config(config)
    return config


def _run(options: argparse.Namespace, kind: str, policy: str, budget: int, seed: int) -> dict[str, Any]:
    config = _run_config(options, kind, policy, budget, seed)
    held_out = HeldOut(_run_config(options, "full", "", 0, options.seed), options.model)
    found: list[float] = []

    def evaluate(weights: Path) -> None:
        scored = held_out.sample(NativeGenerator(weights, max_sequences=options.batch_size))
        found.append(statistics.fmean(reward for _, _, reward in scored))

    evaluate(options.model)
    began = time.perf_counter()
    curve = list(train(config, options.model, options.staleness, evaluate))
    return {
        "arm": kind, "policy": policy, "budget": budget, "seed": seed, "steps": len(curve),
        "held_out_before": found[0], "held_out_after": found[1], "seconds": time.perf_counter() - began,
        "curves": {key: [row.get(key) for row in curve] for key in KEPT},
    }  # fmt: skip


def verdicts_of(rows: Sequence[dict[str, Any]], policy: str, budget: int, margin: float) -> list[str]:
    """What holds at one budget: corrected against the full cache, and against uncorrected, seed by seed."""

    def after(arm: str, policy: str, budget: int) -> list[float]:
        return [r["held_out_after"] for r in rows if (r["arm"], r["policy"], r["budget"]) == (arm, policy, budget)]

    corrected = after("corrected", policy, budget)
    full, uncorrected = after("full", "", 0), after("uncorrected", policy, budget)
    low, high = interval([a - b for a, b in zip(corrected, full, strict=True)])
    word = "equivalent to" if -margin <= low and high <= margin else "not shown to be equivalent to"
    lines = [
        f"{policy} {budget}: corrected ({statistics.fmean(corrected):.3f}) is {word} the full cache "
        f"({statistics.fmean(full):.3f}): difference {low:+.3f} to {high:+.3f}, margin {margin}"
    ]
    low, high = interval([a - b for a, b in zip(corrected, uncorrected, strict=True)])
    word = "better than" if low > 0 else "not shown to be better than"
    lines.append(
        f"{policy} {budget}: corrected is {word} uncorrected ({statistics.fmean(uncorrected):.3f}): difference "
        f"{low:+.3f} to {high:+.3f}"
    )
    return lines


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Of the mean of paired differences, by Student's t, at `CONFIDENCE`."""
    mean, half = statistics.fmean(differences), margin_95(differences)
    return mean - half, mean + half


def _name(row: dict[str, Any]) -> str:
    return f"{row['arm']} {row['policy']} {row['budget']}" if row["policy"] else str(row["arm"])
