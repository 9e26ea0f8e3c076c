"""Entropy-adaptive switching: reward against the large model's share of the tokens, and training on such rollouts.

    rollahead bench switching --model DIR --small-model DIR --prompts FILE --calibration FILE --out DIR
    rollahead bench switching --train --model DIR --small-model DIR --prompts FILE --train-prompts FILE --out DIR

The curve: for each rule thresholds calibrated on other prompts, each beside a control that switches as often but at
random, and the two models alone; all on the same prompts with the same seeds. `--train`: equal steps without
switching, with switching and correction, and with switching alone (`benchmarks/switching_training.py`).
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import plots
from benchmarks.options import SEED, Parser, at_least, each, fraction, names, not_negative, temperature
from benchmarks.results import write_results
from benchmarks.student import standard_error
from pipeline.config.types import TaskSection
from pipeline.engine.generator import FinishedSample, GroupRequest
from pipeline.engine.native.calibration import calibrate, policy_share
from pipeline.engine.native.generator import NativeGenerator
from pipeline.engine.native.switching import SwitchingRule, SwitchState, in_nats, parse_rule
from pipeline.errors import UsageError
from pipeline.messages import Sampler, SamplingParams
from pipeline.models.checkpoint import load_decoder
from pipeline.models.decoder import Decoder
from pipeline.models.tokenizer import Tokenizer, check_same_tokenizer
from pipeline.tasks.base import Example
from pipeline.tasks.jsonl import read_examples
from pipeline.tasks.rewards import load_reward, score_group

PAPER = ((0.43, 0.967, "Llama pair, MATH"), (0.25, 0.929, "Qwen pair, MATH"))
"""(share of large-model tokens, share of the large model's quality) that arXiv 2502.06833 reports; other models, other
task: to look at beside ours, not to compare with."""


def main(arguments: list[str]) -> int:
    """Measures, prints a line a point, writes `results.json` and a plot; the exit code."""
    options = _parser().parse_args(arguments)
    if not (options.train or options.shares or options.thresholds):
        raise UsageError("--shares and --thresholds are both empty, so the curve has no point; give one of them")
    torch.set_num_threads(options.threads)
    check_same_tokenizer(options.model, options.small_model, "--small-model")
    if options.train:
        from benchmarks.switching_training import compare

        return compare(options)
    curve = Curve(options)
    rows = [curve.alone(curve.large, "large", 1.0), curve.alone(curve.small, "small", 0.0)]
    for rule in options.rules:
        given = [replace(rule, threshold=in_nats(h, options.unit)) for h in options.thresholds]
        for found, share in [*((curve.calibrated(rule, s), s) for s in options.shares), *((g, None) for g in given)]:
            rows.append(curve.point(found, share))
            control = curve.random_rule(rule, rows[-1]["share"], rows[-1]["response_tokens"])
            rows.append(curve.point(control, share))
    compared(rows)
    about: dict[str, Any] = {
        "model": str(options.model), "seed": options.seed, "small_model": str(options.small_model),
        "prompts": str(options.prompts), "paper": PAPER,
    }  # fmt: skip
    write_results(options.out, "switching", rows, **about)  # whatever becomes of the verdicts
    verdicts = conclusions(rows)
    print("\n".join(verdicts))
    path = write_results(options.out, "switching", rows, **about, verdicts=verdicts)
    print(f"written {path}" + "".join(f" and {plot}" for plot in [_plot(rows, options.out)] if plot))
    return 0


def _parser() -> Parser:
    parser = Parser(prog="rollahead bench switching", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="the large model, the policy")
    add("--small-model", type=Path, required=True, metavar="DIR", help="of the same tokenizer")
    add("--prompts", type=Path, required=True, metavar="FILE", help=".jsonl of question and answer, to measure on")
    add("--calibration", type=Path, metavar="FILE", help=".jsonl of other prompts, for thresholds")
    add(
        "--shares",
        type=each(fraction),
        default=[0.1, 0.25, 0.43],
        metavar="S,S",
        help="of large-model tokens, to calibrate to",
    )
    add("--thresholds", type=each(not_negative), default=[], metavar="H,H", help="further points at these thresholds")
    add("--unit", choices=["nats", "bits"], default="nats", help="of --thresholds")
    add(
        "--rules",
        type=_rules,
        default=_rules("5:10,1:1:before"),
        metavar="W:D,...",
        help="window and min_run, and `before` for engine.switching.before_sampling; the paper's is 5:10; --train has "
        "the first one",
    )
    add("--count", type=at_least(1), default=200, metavar="N", help="prompts measured on")
    add("--calibration-count", type=at_least(1), default=48, metavar="N", help="prompts calibrated on")
    add("--samples", type=at_least(1), default=1, metavar="N", help="responses a prompt")
    add("--temperature", type=temperature, default=1.0, metavar="T")
    add("--max-new-tokens", type=at_least(1), default=200, metavar="N")
    add("--batch", type=at_least(1), default=64, metavar="N", help="sequences at once")
    add("--seed", type=SEED, default=0)
    add("--threads", type=at_least(1), default=1)
    add("--train", action="store_true", help="compare training instead; --prompts are held out")
    add("--train-prompts", type=Path, metavar="FILE", help="with --train: .jsonl to train on")
    add("--steps", type=at_least(1), default=20, help="with --train: batches")
    add("--seeds", type=at_least(1), default=3, help="with --train: seeds, from --seed on")
    add("--share", type=fraction, default=0.43, help="with --train: share of large-model tokens")
    add("--margin", type=float, default=0.05, help="with --train: difference in held-out reward that counts as none")
    add("--learning-rate", type=float, default=2e-5, help="with --train")
    add("--batch-size", type=at_least(1), default=64, help="with --train: samples a batch")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="with --train: the learner's products")
    add(
        "--runs",
        type=at_least(0),
        default=0,
        help="with --train: at most so many now; the same command goes on; 0: all",
    )
    add("--out", type=Path, default=Path("runs/switching"))
    return parser


def _rules(text: str) -> list[SwitchingRule]:
    if not names(text):
        raise argparse.ArgumentTypeError(f"{text!r} holds no rule; write for example 5:10,1:1:before")
    try:
        return [parse_rule(part) for part in names(text)]
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def name_of(rule: SwitchingRule) -> str:
    """As `--rules` takes it."""
    return f"{rule.window}:{rule.min_run}" + (":before" if rule.before_sampling else "")


class Curve:
    """The two models, the prompts, and a point of the curve at a time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.large, self.small = load_decoder(options.model), load_decoder(options.small_model)
        self.tokenizer = Tokenizer(options.model)
        self.reward = load_reward("numeric-answer")
        section = TaskSection(kind="jsonl")
        self.examples = read_examples(options.prompts, section)[: options.count]
        if options.calibration is None:
            raise UsageError("a curve needs --calibration, a .jsonl file of prompts other than --prompts")
        others = read_examples(options.calibration, section)[: options.calibration_count]
        if shared := {e.prompt for e in self.examples} & {e.prompt for e in others}:
            raise UsageError(f"--calibration has {len(shared)} prompts of --prompts; calibrate on others")
        self.requests = self._requests(self.examples, 0, options.samples)
        self.calibration = self._requests(others, 1 << 20, 1)

    def _requests(self, examples: Sequence[Example], first: int, samples: int) -> list[GroupRequest]:
        options = self.options
        sampling = SamplingParams(temperature=options.temperature, max_new_tokens=options.max_new_tokens)
        return [
            GroupRequest(
                first + index, np.array(self.tokenizer.encode(example.prompt), np.int64), sampling,
                tuple(options.seed * 1_000_003 + first + index * samples + s for s in range(samples)),
            )
            for index, example in enumerate(examples)
        ]  # fmt: skip

    def _generator(self, model: Decoder, rule: SwitchingRule | None = None) -> NativeGenerator:
        longest = max(len(r.prompt_ids) for r in self.requests + self.calibration)
        return NativeGenerator(
            model,
            max_sequences=self.options.batch,
            max_length=longest + self.options.max_new_tokens,
            small_model=self.small if rule else None,
            switching=rule,
        )

    def calibrated(self, rule: SwitchingRule, share: float) -> SwitchingRule:
        """The rule with the threshold that gives that share on the calibration prompts."""
        generator = self._generator(self.large, rule)
        found = calibrate(generator, self.calibration, share)
        assert generator.small is not None
        print(
            f"{name_of(rule)} share {share:g}: threshold {found.threshold:.4g} nats, {found.share:.3f} in calibration",
            flush=True,
        )
        return generator.small.rule

    def random_rule(self, rule: SwitchingRule, share: float, tokens: float) -> SwitchingRule:
        """The control whose share is nearest on responses of so many tokens."""
        return min(
            (replace(rule, threshold=float(t), noise=True) for t in np.linspace(0.01, 0.99, 99)),
            key=lambda candidate: abs(simulated_share(candidate, round(tokens)) - share),
        )

    def alone(self, model: Decoder, name: str, share: float) -> dict[str, Any]:
        """A point of one model without the other."""
        return self._row(self._generator(model), {"system": name, "threshold": None, "wanted": share}, share)

    def point(self, rule: SwitchingRule, wanted: float | None) -> dict[str, Any]:
        system = "random" if rule.noise else "entropy"
        row = {"system": system, "rule": name_of(rule), "threshold": rule.threshold, "wanted": wanted}
        return self._row(self._generator(self.large, rule), row, None)

    def _row(self, generator: NativeGenerator, row: dict[str, Any], share: float | None) -> dict[str, Any]:
        began, cpu = time.perf_counter(), time.process_time()
        for request in self.requests:
            generator.add(request)
        done: list[FinishedSample] = []
        while generator.has_work():
            done += generator.step()
        rewards = self._rewards(done)
        share = policy_share(done) if share is None else share
        row |= {
            "share": share,
            "reward": statistics.fmean(rewards),
            "reward_error": standard_error(rewards),
            "samples": len(done),
            "tokens": sum(len(s.token_ids) for s in done),
            "response_tokens": statistics.fmean(len(s.token_ids) for s in done),
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,
            **self._cost(generator, done, share),
        }
        print(
            f"{row['system']} {row.get('rule', '')}: {share:.1%} of tokens from the large model, reward "
            f"{row['reward']:.3f} +- {row['reward_error']:.3f}, cost {row['cost']:.2f}",
            flush=True,
        )
        return row

    def _cost(self, generator: NativeGenerator, done: Sequence[FinishedSample], share: float) -> dict[str, Any]:
        """Parameters times tokens that were sampled, over the large model's for all of them, as the paper counts; and
        with what catch-ups computed (the prompts of a group once, the first computation of a prompt not counted) and
        the small model's tokens that it handed over."""
        ratio = self.small.bytes / self.large.bytes
        tokens = sum(len(s.token_ids) for s in done)
        handed_over = generator.small.handed_over if generator.small else 0
        sampled = share + (1 - share + handed_over / tokens) * ratio
        switches = sum(int((np.diff(s.samplers.astype(np.int64)) != 0).sum()) for s in done)
        caught = generator.small.caught_up if generator.small else {Sampler.POLICY: 0, Sampler.SWITCHED_MODEL: 0}
        extra = (caught[Sampler.POLICY] + caught[Sampler.SWITCHED_MODEL] * ratio) / tokens
        return {
            "cost": sampled,
            "cost_with_catch_up": sampled + extra,
            "caught_up_large": caught[Sampler.POLICY],
            "handed_over": handed_over,
            "caught_up_small": caught[Sampler.SWITCHED_MODEL],
            "switches_a_response": switches / len(done),
        }

    def _rewards(self, done: Sequence[FinishedSample]) -> list[float]:
        """Of each prompt, the mean of its samples."""
        by_prompt: dict[int, list[str]] = {}
        for sample in done:
            by_prompt.setdefault(sample.group, []).append(self.tokenizer.decode(sample.token_ids.tolist()))
        rewards = []
        for index, texts in sorted(by_prompt.items()):
            example = self.examples[index]
            columns = {key: [value] * len(texts) for key, value in example.columns.items()}
            scores = score_group(self.reward, [example.prompt] * len(texts), texts, columns)
            rewards.append(statistics.fmean(score.reward or 0.0 for score in scores))
        return rewards


def simulated_share(rule: SwitchingRule, tokens: int, responses: int = 400) -> float:
    """Share of large-model tokens of a random control in responses of that length."""
    large = 0
    for seed in range(responses):
        state = SwitchState(rule, seed)
        for _ in range(tokens):
            state.hand_over(0.0)
            large += not state.small
            state.step(0.0)
    return large / (responses * tokens)


def compared(rows: Sequence[dict[str, Any]]) -> None:
    """Adds to each row its share of the large model's reward; None where that is nothing."""
    large = next(row["reward"] for row in rows if row["system"] == "large")
    for row in rows:
        row["of_large"] = row["reward"] / large if large else None


def conclusions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the curve says about the claim: half of the tokens or fewer, 93% of the reward, better than at random."""
    by_system: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_system.setdefault(row["system"], []).append(row)
    lines = _of_large(by_system["small"][0], by_system.get("entropy", []))
    for entropy, random in zip(by_system.get("entropy", []), by_system.get("random", []), strict=True):
        error = math.hypot(entropy["reward_error"], random["reward_error"])
        lines.append(
            f"{entropy['rule']} share {entropy['share']:.1%}: reward {entropy['reward']:.3f}; at random "
            f"{random['share']:.1%}: {random['reward']:.3f}; difference "
            f"{entropy['reward'] - random['reward']:+.3f} +- {error:.3f}"
        )
    return lines


def _of_large(small: dict[str, Any], points: Sequence[dict[str, Any]]) -> list[str]:
    """What the small model alone, and the best point, have of the large model's reward."""
    if small["of_large"] is None:
        return ["the large model earns nothing here, so there is no share of its reward; measure on what it can solve"]
    lines = [f"the small model alone earns {small['of_large']:.1%} of the large one's reward"]
    good = [row for row in points if row["share"] <= 0.5 and row["of_large"] >= 0.93]
    if not good:
        return [*lines, "no point with at most half of the tokens has 93% of the large model's reward"]
    best = min(good, key=_share)
    return [
        *lines,
        f"{best['of_large']:.1%} of the reward with {best['share']:.1%} of the tokens: 93% with at most half",
    ]


def _plot(rows: Sequence[dict[str, Any]], out: Path) -> Path | None:
    """switching.png: share of the large model's reward against the share of its tokens; None without matplotlib, or
    where that reward is nothing."""
    pyplot, ends = plots.pyplot(), [row for row in rows if row["system"] in ("large", "small")]
    if pyplot is None or ends[0]["of_large"] is None:
        return None

    figure, axes = pyplot.subplots(figsize=(6, 4))
    lines = dict.fromkeys((row["system"], row["rule"]) for row in rows if "rule" in row)
    for system, rule in lines:
        mine = [row for row in rows if (row["system"], row.get("rule")) == (system, rule)]
        points, style = sorted([*mine, *ends], key=_share), "o-" if system == "entropy" else "s--"
        x, y = [row["share"] for row in points], [row["of_large"] for row in points]
        error = [row["reward_error"] / ends[0]["reward"] for row in points]
        axes.errorbar(x, y, yerr=error, fmt=style, label=f"{system} {rule}", capsize=2)
    for share, quality, name in PAPER:
        axes.plot(share, quality, "k*", markersize=9)
        axes.annotate(f"{name} (paper)", (share, quality), textcoords="offset points", xytext=(6, -10), fontsize=7)
    axes.set(xlabel="share of tokens from the large model", ylabel="reward, of the large model's alone")
    axes.legend()
    figure.tight_layout()
    path = out / "switching.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _share(row: dict[str, Any]) -> float:
    return float(row["share"])
