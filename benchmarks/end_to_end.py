"""Seconds a training step, and to a held-out reward: synchronous, asynchronous, with drafters; same learning.

    rollahead bench end-to-end                          the embedded model, three arms, three seeds
    rollahead bench end-to-end --arms synchronous,asynchronous,arbiter,prompt-lookup --seeds 0,1,2
    rollahead bench end-to-end --set model.path=DIR --set task.kind=jsonl --set task.path=FILE --target 0.6
    rollahead bench end-to-end --arm 'wide: engine.drafter.name=arbiter; engine.max_draft_tokens=32'

Every run is `rollahead run` in a folder of its own under --out; runs that are done are not done again, and one that was
interrupted goes on: the same command finishes what is missing. report.html shows all arms on one chart.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from benchmarks.end_to_end_analysis import WARM_UP, compare, run_row
from benchmarks.options import Parser, at_least, integers, names
from benchmarks.results import write_results
from drafters.registry import available
from pipeline.config import EMBEDDED, Config, check_config, load_config
from pipeline.errors import RunFailed, UsageError
from pipeline.run_directory import RunDirectory
from pipeline.telemetry.metrics import read_metrics
from pipeline.telemetry.report import write_report

BASELINE = "synchronous"
PLAIN = "engine.drafter=none"
CHOSEN_ANEW = {("run", "out"), ("transport", "address")}
"""keys that say nothing of what is measured"""


@dataclass(frozen=True)
class Arm:
    name: str
    settings: tuple[str, ...]
    """`--set` arguments that make it differ from the others"""


def main(arguments: list[str]) -> int:
    """Runs what is missing, writes results.json and report.html; the exit code."""
    options = _parser().parse_args(arguments)
    if options.short:
        options.steps, options.seeds = 4, [0]
    arms = [*(_named(name) for name in options.arms), *(_written(text) for text in options.arm)]
    listed = [arm.name for arm in arms]
    if twice := [name for name in dict.fromkeys(listed) if listed.count(name) > 1]:
        raise UsageError(f"arm {twice[0]} is given twice; name each once, and other settings by --arm NAME: ...")
    if not arms:
        raise UsageError("--arms names no arm; give for example --arms synchronous,arbiter")
    runs = [(arm, seed) for seed in options.seeds for arm in arms]
    for arm, seed in runs:  # before the first hour is spent
        config = load_config(_base(options), _settings(options, arm, seed))
        check_config(config)
        check_same(_folder(options, arm, seed), config)
    for number, (arm, seed) in enumerate(runs, 1):
        _train(options, arm, seed, f"{number}/{len(runs)}")
    rows = [run_row(_folder(options, arm, seed), arm.name, seed, options.target) for arm, seed in runs]
    summary = compare(rows, BASELINE if BASELINE in {arm.name for arm in arms} else arms[0].name)
    write_results(
        options.out, "end-to-end", rows, model=_model(options), seed=options.seeds[0], date=date.today().isoformat(),
        steps=options.steps, target=options.target, summary=summary,
        arms={arm.name: list(arm.settings) for arm in arms},
    )  # fmt: skip
    _print(summary)
    print(f"written {options.out / 'results.json'} and {write_report(options.out)}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="rollahead bench end-to-end", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = "synchronous, asynchronous, arbiter, or a drafter"
    parser.add_argument("--arms", type=names, default=["synchronous", "asynchronous", "arbiter"], help=known)
    parser.add_argument(
        "--arm", action="append", default=[], metavar="'NAME: a.b=c; d.e=f'", help="another arm, by its settings"
    )
    parser.add_argument("--seeds", type=integers(0), default=[0, 1, 2], help="for example 0,1,2")
    parser.add_argument("--steps", type=at_least(WARM_UP + 1), default=60, help="optimiser batches a run")
    parser.add_argument(
        "--eval-every", type=at_least(1), default=10, help="batches between evaluations on held-out prompts"
    )
    parser.add_argument("--target", type=float, default=0.6, help="held-out reward whose time is reported")
    parser.add_argument("--config", type=Path, help="TOML file of all arms; default: the embedded one")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="a.b=c", help="for all arms")
    parser.add_argument("--short", action="store_true", help="one seed, four steps: that it works")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-end-to-end"))
    return parser


def _named(name: str) -> Arm:
    """An arm by name; the arbiter is the configuration's default.

    Raises:
        UsageError: there is no such arm and no such drafter.
    """
    if name == "synchronous":
        return Arm(name, ("learner.max_staleness=0", PLAIN))
    if name == "asynchronous":
        return Arm(name, (PLAIN,))
    if name == "arbiter":
        return Arm(name, ())
    drafters = [info.name for info in available()]
    if name not in drafters and ":" not in name:
        known = ", ".join(dict.fromkeys(["synchronous", "asynchronous", "arbiter", *drafters]))
        raise UsageError(f"--arms {name} is unknown; there are {known}, module:Class, and --arm for settings")
    return Arm(name, (f"engine.drafter.name={name}",))


def _written(text: str) -> Arm:
    name, colon, settings = text.partition(":")
    parts = tuple(part.strip() for part in settings.split(";") if part.strip())
    if not colon or not parts:
        raise UsageError(f"--arm {text!r} is not of the form 'NAME: section.key=value; section.key=value'")
    return Arm(name.strip(), parts)


def _base(options: argparse.Namespace) -> Path:
    path: Path = options.config or EMBEDDED
    return path


def _model(options: argparse.Namespace) -> str:
    return load_config(_base(options), options.settings).model.path or "embedded"


def _settings(options: argparse.Namespace, arm: Arm, seed: int) -> list[str]:
    ours = [f"run.seed={seed}", f"run.steps={options.steps}", "run.measure_drafting=false"]
    return [*ours, f"learner.eval_every={options.eval_every}", *options.settings, *arm.settings]


def _folder(options: argparse.Namespace, arm: Arm, seed: int) -> Path:
    folder: Path = options.out / arm.name.replace(":", "_").replace("/", "_") / f"seed-{seed}"
    return folder


def check_same(folder: Path, config: Config) -> None:
    """What was trained in a folder had this configuration; a run may change more when it goes on, a comparison may not.

    Raises:
        UsageError: names every key that differs, with both values.
    """
    run = RunDirectory(folder)
    if not run.holds_a_run() and not read_metrics(run.metrics):
        return
    try:
        before, now = msgspec.to_builtins(load_config(run.config, [])), msgspec.to_builtins(config)
    except UsageError as error:
        raise UsageError(f"{folder} holds a run that cannot be compared: {error}; or choose another --out") from error
    differing = [
        f"{section}.{key} ({before[section][key]!r} before, {value!r} now)"
        for section, keys in now.items()
        for key, value in keys.items()
        if before[section][key] != value and (section, key) not in CHOSEN_ANEW
    ]
    if differing:
        raise UsageError(
            f"{folder} holds a run with another configuration: {'; '.join(differing)}; use the same values or "
            "another --out"
        )


def _train(options: argparse.Namespace, arm: Arm, seed: int, which: str) -> None:
    """One run to its end, if it is not there already.

    Raises:
        RunFailed: it failed; what it said is above.
    """
    folder = _folder(options, arm, seed)
    done = len(read_metrics(folder / "metrics.jsonl"))
    if done >= options.steps:
        print(f"{which} {arm.name}, seed {seed}: done before")
        return
    print(f"{which} {arm.name}, seed {seed}: {options.steps - done} steps, load {os.getloadavg()[0]:.1f}", flush=True)
    command = [sys.executable, "-m", "pipeline.cli", "run", str(_base(options)), "--out", str(folder)]
    for setting in _settings(options, arm, seed):
        command += ["--set", setting]
    began = time.monotonic()
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    if code:
        raise RunFailed(
            f"{arm.name}, seed {seed} ended with exit code {code}; see {folder / 'logs'}, then give the same command"
        )
    print(f"{which} {arm.name}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)


def _print(summary: Sequence[dict[str, Any]]) -> None:
    print(f"{'arm':<18} {'s/step':>8} {'ratio':>7} {'(min-max)':>13} {'reward gap':>11} {'noise':>7} {'to target':>10}")
    for row in summary:
        ratio, reached = row["ratio"], [s for s in row["seconds_to_target"] if s is not None]
        target = f"{median(reached):.0f} s" if reached else "not reached"
        bounds = f"({ratio['min']:.2f}-{ratio['max']:.2f})"
        print(
            f"{row['arm']:<18} {row['step_seconds']['median']:>8.2f} {ratio['median']:>6.2f}x {bounds:>13} "
            f"{row['reward_gap']:>+11.3f} {row['reward_noise']:>7.3f} {target:>11}"
        )
