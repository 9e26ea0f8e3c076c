"""What `rollahead bench switching --train` compares: equal steps, with who samples and what corrects changed.

Three settings on the same prompts, seeds and initial weights, synchronously, so that nothing but the small model makes
rollouts off-policy: no switching; switching with truncated importance weights; switching with none. What is compared is
the held-out reward of the trained policy, which samples alone then. The margin within which two settings count as
equivalent is an option, to be chosen before running.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.held_out import check_apart
from benchmarks.plots import training_curves
from benchmarks.results import earlier_rows, write_results
from benchmarks.stale_training import train
from benchmarks.student import margin_95
from benchmarks.switching import name_of
from learner.step_metrics import Metrics
from pipeline.config import Config, check_config, load_config
from pipeline.engine.generator import GroupRequest
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from pipeline.models.tokenizer import Tokenizer
from pipeline.tasks.jsonl import read_examples
from pipeline.tasks.rewards import load_reward, score_group

WHAT = "switching-training"
TIS = "objective.corrections=[{name='tis', level='token', cap=2.0}]"
SETTINGS = {"policy": (False, TIS), "corrected": (True, TIS), "uncorrected": (True, "objective.corrections=[]")}
"""Name -> whether the engine switches, and the corrections."""
KEPT = ("reward_mean", "entropy", "importance_weight_ess", "mismatch_k3", "response_length_mean")
SAMPLER_KEYS = (
    "sampler/policy/share",
    "sampler/switched-model/mass",
    "sampler/switched-model/ess",
    "k3/other_samplers",
)

PLOTTED = {"reward_mean": "reward of the rollouts", "k3/other_samplers": "k3, policy against small model"}


def compare(options: argparse.Namespace) -> int:
    """Trains every setting with every seed, prints what follows, writes `results.json` and a plot; the exit code."""
    if options.train_prompts is None:
        raise UsageError("--train needs --train-prompts, a .jsonl file to train on")
    if options.seeds < 2:
        raise UsageError(f"--seeds {options.seeds} gives no interval; use at least 2")
    check_apart(options.prompts, options.train_prompts)
    held_out, settings = HeldOut(options), settings_of(options)
    rows = earlier_rows(options.out, WHAT, settings)
    if not any(row["setting"] == "before" for row in rows):
        rows.append({"setting": "before", "seed": -1, "held_out": held_out.reward(options.model)})
    print(f"equivalent: 90% interval of the difference of held-out rewards within {options.margin}")
    print(f"before training: held-out reward {rows[0]['held_out']:.3f}", flush=True)
    known = {(row["setting"], row["seed"]) for row in rows}
    runs = [(name, seed) for seed in range(options.seed, options.seed + options.seeds) for name in SETTINGS]
    missing = [run for run in runs if run not in known]
    for name, seed in missing[: options.runs or None]:
        rows.append(_row(options, held_out, name, seed))
        print(
            f"seed {seed}, {name}: held-out reward {rows[-1]['held_out']:.3f}, training reward of the last batches "
            f"{rows[-1]['reward_last']:.3f}, {rows[-1]['seconds']:.0f} s",
            flush=True,
        )
        # After every run: what hours have brought is not lost with a machine.
        path = write_results(
            options.out, WHAT, rows, model=str(options.model), seed=options.seed, settings=settings,
            verdicts=conclusions(rows, options.margin),
        )  # fmt: skip
        print(f"written {path}", flush=True)
    print("\n".join(conclusions(rows, options.margin)))
    trained = [(row["setting"], row["curve"]) for row in rows if "curve" in row]
    if plot := training_curves(options.out / f"{WHAT}.png", trained, PLOTTED):
        print(f"written {plot}")
    return 0


def settings_of(options: argparse.Namespace) -> dict[str, str]:
    """All that a row depends on."""
    own = {key: str(value) for key, value in vars(options).items() if key not in ("out", "runs", "seeds")}
    return own | {"rules": ",".join(map(name_of, options.rules))}


class HeldOut:
    """Reward of a policy on prompts that are not trained on; the policy samples alone."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._tokenizer = options, Tokenizer(options.model)
        self._examples = read_examples(options.prompts, _config(options, "policy", 0).task)[: options.count]
        self._reward = load_reward("numeric-answer")

    def reward(self, weights: Path) -> float:
        """Mean over the prompts, the same seeds for every policy."""
        options = self._options
        generator = NativeGenerator(options.model, max_sequences=options.batch, max_length=_longest(options))
        generator.load_weights(weights, 0)
        sampling = SamplingParams(temperature=options.temperature, max_new_tokens=options.max_new_tokens)
        for index, example in enumerate(self._examples):
            prompt = np.array(self._tokenizer.encode(example.prompt), np.int64)
            seeds = tuple(10_000 + index * options.samples + s for s in range(options.samples))
            generator.add(GroupRequest(index, prompt, sampling, seeds))
        rewards = []
        while generator.has_work():
            for sample in generator.step():
                example = self._examples[sample.group]
                columns = {key: [value] for key, value in example.columns.items()}
                text = self._tokenizer.decode(sample.token_ids.tolist())
                rewards.append(score_group(self._reward, [example.prompt], [text], columns)[0].reward or 0.0)
        return statistics.fmean(rewards)


def _longest(options: argparse.Namespace) -> int:
    config = _config(options, "policy", 0)
    return config.sampling.max_prompt_tokens + config.sampling.max_new_tokens


def _config(options: argparse.Namespace, setting: str, seed: int) -> Config:
    (switches, corrections), rule = SETTINGS[setting], options.rules[0]
    overrides = [
        f"model.path={options.model}", "task.kind=jsonl", f"task.path={options.train_prompts}",
        f"run.steps={options.steps}", f"run.seed={seed}", "engine.drafter=none",
        f"engine.max_sequences={options.batch}", f"engine.threads={options.threads}",
        f"sampling.max_new_tokens={options.max_new_tokens}", f"sampling.temperature={options.temperature}",
        "sampling.max_prompt_tokens=256", "objective.gates=[]", corrections, "learner.max_staleness=0",
        f"learner.learning_rate={options.learning_rate}", f"learner.batch_size={options.batch_size}",
        "learner.minibatches=1", f"learner.dtype={options.dtype}",
    ]  # fmt: skip
    if switches:
        overrides += [
            f"engine.switching.small_model={options.small_model}", f"engine.switching.policy_share={options.share}",
            f"engine.switching.window={rule.window}", f"engine.switching.min_run={rule.min_run}",
            f"engine.switching.before_sampling={str(rule.before_sampling).lower()}",
            f"engine.switching.calibration_prompts={options.calibration_count}",
        ]  # fmt: skip
    config = load_config(None, overrides)
    check_config(config)
    return config


def _row(options: argparse.Namespace, held_out: HeldOut, setting: str, seed: int) -> dict[str, Any]:
    began = time.perf_counter()
    rewards: list[float] = []
    config = _config(options, setting, seed)
    curve = list(train(config, options.model, 0, lambda weights: rewards.append(held_out.reward(weights))))
    last = curve[-max(1, len(curve) // 4) :]
    return {
        "setting": setting,
        "seed": seed,
        "held_out": rewards[0],
        "reward_last": statistics.fmean(step["reward_mean"] or 0.0 for step in last),
        "curve": {key: _values(curve, key) for key in KEPT + SAMPLER_KEYS if any(key in step for step in curve)},
        "seconds": time.perf_counter() - began,
    }


def _values(curve: Sequence[Metrics], key: str) -> list[float | None]:
    return [step.get(key) for step in curve]


def conclusions(rows: Sequence[dict[str, Any]], margin: float) -> list[str]:
    """Equivalence of "corrected" and "policy" within the margin, by two one-sided tests at 5% on differences seed by
    seed, and whether "corrected" is better than "uncorrected" at 5%; nothing is concluded from one seed."""
    reward = {(row["setting"], row["seed"]): row["held_out"] for row in rows}
    lines = []
    for other in ("policy", "uncorrected"):
        seeds = sorted({s for name, s in reward if name == other} & {s for name, s in reward if name == "corrected"})
        differences = [reward["corrected", seed] - reward[other, seed] for seed in seeds]
        if len(differences) < 2:
            continue
        mean, half = statistics.fmean(differences), margin_95(differences)
        shown = f"corrected - {other}: {mean:+.3f}, 90% interval [{mean - half:+.3f}, {mean + half:+.3f}]"
        if other == "policy":
            inside = -margin < mean - half and mean + half < margin
            lines.append(f"{shown}: {'equivalent' if inside else 'not shown to be equivalent'} within {margin:g}")
        else:
            lines.append(f"{shown}: {'better' if mean - half > 0 else 'not shown to be better'}")
    return lines
