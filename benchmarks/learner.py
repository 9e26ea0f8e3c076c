"""What corrections and entropy control do to training on stale rollouts; a step's speed and memory against TRL.

    rollahead bench learner --what stability --out DIR            seven settings at staleness 0, 2, 4 and 8
    rollahead bench learner --what stability --short --out DIR    a few steps of two of them, to see that it runs
    rollahead bench learner --what speed --out DIR                a step's tokens/s and memory (learner_speed.py)

The same prompts, seeds and initial weights, rollouts of an exact age. The learning rate and
the optimiser steps a batch are high on purpose: what drifts, drifts soon.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import plots
from benchmarks.options import SEED, Parser, at_least, integers, names
from benchmarks.results import spread, write_results
from benchmarks.stale_training import train
from learner.step_metrics import Metrics
from pipeline.config import EMBEDDED, Config, check_config, load_config
from pipeline.errors import UsageError

BASE = ["objective.surrogate={name='ppo-clip', clip_low=0.2, clip_high=0.28}", "objective.gates=[]"]
TIS = "objective.corrections=[{name='tis', cap=2.0}]"
SETTINGS = {
    "uncorrected": [*BASE, "objective.corrections=[]"],
    "tis": [*BASE, TIS],
    "geometric-tis": [*BASE, "objective.corrections=['geometric-mask', 'tis']"],
    "erc": [*BASE, TIS, "objective.gates=['erc']"],
    "gppo": [TIS, "objective.gates=[]", "objective.surrogate=gppo"],
    "ce-gppo": [TIS, "objective.gates=[]", "objective.surrogate={name='ce-gppo', beta_low=0.5}"],
    "entropy-held": [*BASE, TIS],
}
"""What is compared -> overrides. "erc" against "tis" is ERC on and off; "entropy-held" adds an entropy controller: a
bonus on either side of the target. Advantages have unit variance, so a bonus competes with them at some tenths: that is
what its coefficient comes to for an entropy one target away, at once and, by its integral, within half a run of any
length; the second half is judged."""
HELD_AT_ONCE, HELD_IN_HALF_A_RUN = 0.2, 1.0
HELD_WITHIN = 0.1
"""A controller holds its target where entropy is within this share of it."""
WINDOW = 10
"""Batches that an entropy is averaged over: how hard a batch's prompts are moves its own by a third."""
KEPT = ("reward_mean", "entropy", "grad_norm", "clip_fraction", "importance_weight_ess", "staleness_mean", "loss")


def main(arguments: list[str]) -> int:
    """Measures, prints a table, writes `results.json` and a plot; the exit code."""
    if _asked_for(arguments) == "speed":
        from benchmarks.learner_speed import measure

        return measure(arguments)
    options = _options(arguments)
    unknown = sorted(set(options.settings) - SETTINGS.keys())
    if unknown:
        raise UsageError(f"--settings {unknown[0]!r} is unknown; there are {', '.join(SETTINGS)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = _model(options)
    rows: list[dict[str, Any]] = []
    for staleness in options.staleness:
        for setting in options.settings:
            for seed in range(options.seed, options.seed + options.seeds):
                rows.append(_measure(options, folder, setting, staleness, seed))
                print(_line(rows[-1]), flush=True)
                path = _write(options, rows)  # of every run when it is done: all of them take an hour
    plot = _plot(rows, options.out)
    print("\n".join(["", *_verdicts(rows), "", f"written {path}" + (f" and {plot}" if plot else "")]))
    return 0


def _write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> Path:
    return write_results(
        options.out, "learner-stability", rows, model=str(options.model or "embedded"), seed=options.seed,
        settings={name: SETTINGS[name] for name in options.settings}, verdicts=_verdicts(rows), steps=options.steps,
        learning_rate=options.learning_rate, minibatches=options.minibatches,
    )  # fmt: skip


def _asked_for(arguments: Sequence[str]) -> str:
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--what", default="stability")
    return str(parser.parse_known_args(list(arguments))[0].what)


def _parser() -> Parser:
    parser = Parser(prog="rollahead bench learner", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--what", choices=["stability", "speed"], default="stability", help="what is measured")
    parser.add_argument("--out", type=Path, default=Path("bench/learner"), help="folder of results.json and the plot")
    parser.add_argument("--model", type=Path, help="checkpoint to start from; default: the embedded model")
    parser.add_argument("--settings", type=names, default=list(SETTINGS), help=f"of {','.join(SETTINGS)}")
    parser.add_argument("--staleness", type=integers(0), default=[0, 2, 4, 8], help="batches, for example 0,2,4,8")
    parser.add_argument("--steps", type=at_least(1), default=60, help="batches a run")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--seeds", type=at_least(1), default=1, help="runs of each, with seeds from --seed on")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="twice the demo's")
    parser.add_argument("--minibatches", type=at_least(1), default=4, help="optimiser steps a batch")
    parser.add_argument("--target", type=float, default=0.0, help="entropy to hold, nats; 0: that of the first batch")
    parser.add_argument("--threads", type=at_least(0), default=0)
    parser.add_argument("--short", action="store_true", help="3 steps of uncorrected and entropy-held at 0 and 2")
    return parser


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    if "--short" in arguments:
        parser.set_defaults(steps=3, staleness=[0, 2], settings=["uncorrected", "entropy-held"])
    return parser.parse_args(arguments)


def _config(options: argparse.Namespace, setting: str, seed: int, *more: str) -> Config:
    config = load_config(
        EMBEDDED,
        [
            f"run.steps={options.steps}", f"run.seed={seed}", f"learner.learning_rate={options.learning_rate}",
            f"learner.minibatches={options.minibatches}", "learner.warmup_steps=0", *SETTINGS[setting], *more,
        ],
    )  # fmt: skip
    check_config(config)
    return config


def _model(options: argparse.Namespace) -> Path:
    if options.model is not None:
        return Path(options.model)
    from learner.warm_start import ensure_embedded_model
    from pipeline.stop import StopSignal
    from pipeline.telemetry.progress import WarmStartView

    stop = StopSignal()
    with WarmStartView() as view:
        return ensure_embedded_model(load_config(EMBEDDED, []), lambda progress: view.show(progress, stop))


def _measure(options: argparse.Namespace, folder: Path, setting: str, staleness: int, seed: int) -> dict[str, Any]:
    """One run: its curves and what they come to."""
    more: list[str] = []
    target = options.target
    if setting == "entropy-held":
        target = target or _first_entropy(options, folder, seed)
        step = 2 * HELD_IN_HALF_A_RUN / options.steps
        more = [
            f"objective.regularisers=[{{name='adaptive-entropy', target={target}, step={step:.3g}, "
            f"proportional={HELD_AT_ONCE}}}]"
        ]
    began = time.perf_counter()
    curve = list(train(_config(options, setting, seed, *more), folder, staleness))
    row = {
        "setting": setting, "staleness": staleness, "seed": seed, "steps": len(curve),
        "seconds": time.perf_counter() - began, **summary(curve), "curves": {key: _curve(curve, key) for key in KEPT},
    }  # fmt: skip
    if setting == "entropy-held":
        row |= held(_curve(curve, "entropy"), target)
    return row


def _first_entropy(options: argparse.Namespace, folder: Path, seed: int) -> float:
    """Entropy of the initial policy on the first batch, nats a token."""
    config = _config(options, "tis", seed)
    config.run.steps = 1
    (metrics,) = train(config, folder, 0)
    entropy = metrics["entropy"]
    assert entropy is not None
    return round(entropy, 3)


def _curve(curve: Sequence[Metrics], key: str) -> list[float]:
    return [float("nan") if row[key] is None else float(row[key] or 0.0) for row in curve]


def summary(curve: Sequence[Metrics]) -> dict[str, Any]:
    """What a run comes to: rewards at both ends, entropy, and how much entropy and gradient norm jump between steps."""
    rewards, entropies = _curve(curve, "reward_mean"), _curve(curve, "entropy")
    norms = [value for value in _curve(curve, "grad_norm") if value == value]
    window = max(1, min(10, len(rewards) // 3))
    return {
        "reward_first": statistics.fmean(rewards[:window]),
        "reward_last": statistics.fmean(rewards[-window:]),
        "reward_best": max(rewards),
        "entropy_first": entropies[0],
        "entropy_last": statistics.fmean(entropies[-window:]),
        "entropy_fluctuation": fluctuation(entropies),
        "grad_norm": spread(norms) if norms else None,
        "grad_norm_fluctuation": fluctuation(norms),
        "skipped_steps": sum(float(row["skipped_steps"] or 0) for row in curve),
    }


def fluctuation(values: Sequence[float]) -> float | None:
    """Root mean square of the change from step to step, over the mean; None of fewer than two values."""
    if len(values) < 2 or not statistics.fmean(values):
        return None
    changes = [(b - a) ** 2 for a, b in itertools.pairwise(values)]
    return statistics.fmean(changes) ** 0.5 / abs(statistics.fmean(values))


def held(entropies: Sequence[float], target: float) -> dict[str, Any]:
    """How well a target was held over the second half of a run."""
    half = entropies[len(entropies) // 2 :]
    width = min(WINDOW, len(half))
    windows = [statistics.fmean(half[i : i + width]) for i in range(len(half) - width + 1)]

    def inside(values: Sequence[float]) -> float:
        return sum(abs(value - target) <= HELD_WITHIN * target for value in values) / len(values)

    return {
        "target": target,
        "target_mean_error": abs(statistics.fmean(half) - target) / target,
        "target_windows_inside": inside(windows),
        "target_steps_inside": inside(half),
    }


def _line(row: dict[str, Any]) -> str:
    def shown(value: float | None) -> str:
        return "      -" if value is None else f"{value:7.3f}"

    return (
        f"staleness {row['staleness']}  {row['setting']:<14}"
        f" reward {row['reward_first']:.3f} -> {row['reward_last']:.3f}"
        f"  entropy {row['entropy_first']:.3f} -> {row['entropy_last']:.3f}"
        f"  fluctuation: entropy {shown(row['entropy_fluctuation'])}, gradient {shown(row['grad_norm_fluctuation'])}"
        f"  {row['seconds']:.0f} s"
    )


def _verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What held and what did not, one sentence a claim and staleness; medians over seeds."""
    lines = []
    for staleness in sorted({row["staleness"] for row in rows}):

        def value(setting: str, key: str, staleness: int = staleness) -> float | None:
            found = [r[key] for r in rows if r["setting"] == setting and r["staleness"] == staleness]
            known = [v for v in found if v is not None]
            return statistics.median(known) if known else None

        lines += _compared(staleness, value)
    return lines


def _compared(staleness: int, value: Callable[[str, str], float | None]) -> list[str]:
    claims = [
        ("TIS ends with at least the reward of no correction", "tis", "uncorrected", "reward_last", 1),
        ("a geometric mask with TIS does too", "geometric-tis", "uncorrected", "reward_last", 1),
        ("ERC calms the entropy", "erc", "tis", "entropy_fluctuation", -1),
        ("ERC calms the gradient norm", "erc", "tis", "grad_norm_fluctuation", -1),
        ("GPPO ends with at least the reward of PPO's clip", "gppo", "tis", "reward_last", 1),
        ("CE-GPPO keeps at least the entropy of GPPO", "ce-gppo", "gppo", "entropy_last", 1),
    ]
    lines = []
    for text, one, other, key, sign in claims:
        a, b = value(one, key), value(other, key)
        if a is None or b is None:
            continue
        word = "no difference" if a == b else "held" if sign * (a - b) > 0 else "did not hold"
        lines.append(f"staleness {staleness}: {text}: {word} ({key} {a:.3f} against {b:.3f})")
    error, inside = value("entropy-held", "target_mean_error"), value("entropy-held", "target_windows_inside")
    if error is not None and inside is not None:
        word = "held" if error <= HELD_WITHIN else "did not hold"
        lines.append(
            f"staleness {staleness}: the controller keeps the second half's mean entropy within 10% of its target: "
            f"{word} (off by {error:.1%}; {inside:.0%} of the means of {WINDOW} batches were inside)"
        )
    return lines


def _plot(rows: Sequence[dict[str, Any]], out: Path) -> Path | None:
    """stability.png: reward, entropy and gradient norm by staleness; None without matplotlib."""
    pyplot = plots.pyplot()
    if pyplot is None:
        return None

    shown = ("reward_mean", "entropy", "grad_norm")
    ages = sorted({row["staleness"] for row in rows})
    figure, axes = pyplot.subplots(
        len(shown), len(ages), figsize=(4 * len(ages), 9), sharex=True, sharey="row", squeeze=False
    )
    colours = {name: f"C{index}" for index, name in enumerate(SETTINGS)}
    for row in rows:
        for line, key in enumerate(shown):
            axis = axes[line][ages.index(row["staleness"])]
            axis.plot(row["curves"][key], color=colours[row["setting"]], label=row["setting"], linewidth=1)
            if key == "entropy" and "target" in row:
                axis.axhspan(
                    row["target"] * (1 - HELD_WITHIN), row["target"] * (1 + HELD_WITHIN), color="0.85", zorder=0
                )
    for column, age in enumerate(ages):
        axes[0][column].set_title(f"staleness {age}")
        axes[-1][column].set_xlabel("batch")
    for line, key in enumerate(shown):
        axes[line][0].set_ylabel(key.replace("_", " "))
    handles = {text: handle for handle, text in zip(*axes[0][0].get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles))
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path = out / "stability.png"
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
