"""Compressed KV: memory and speed against the full cache, reward against budget; with --train what correcting is worth.

    rollahead bench sparse --model DIR --prompts FILE --out DIR
    rollahead bench sparse --model DIR --prompts FILE --train FILE --budgets 48 --seeds 3 --margin 0.03 --out DIR

Speed: the same sequences, each of --tokens new tokens, within the same memory (--kv-bytes) and with memory for all of
them, in turns. Reward: held-out problems at every budget, and how far the compressed sampler is from the policy.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import plots
from benchmarks.held_out import HeldOut, Scored
from benchmarks.options import SEED, Parser, at_least, integers, names, temperature
from benchmarks.results import spread, write_results
from benchmarks.student import standard_error
from pipeline.config import Config, check_config, load_config
from pipeline.engine.generator import GroupRequest
from pipeline.engine.native.compression import KVCompression
from pipeline.engine.native.eviction import build
from pipeline.engine.native.generator import NativeGenerator
from pipeline.errors import UsageError
from pipeline.messages import Sampler, SamplingParams
from pipeline.models.checkpoint import load_decoder
from pipeline.models.decoder import Decoder
from pipeline.models.kv_cache import PAGE, KVCache, page_bytes

Setting = tuple[str, int]
"""policy ("full": nothing is dropped), budget"""
FULL: Setting = ("full", 0)
WAITING: Setting = ("full-waiting", 0)
"""full, and no more sequences at once than memory holds to their end, so that none is preempted"""


def main(arguments: list[str]) -> int:
    """Measures, prints a table, writes `results.json` and a plot; the exit code."""
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = [FULL, *((policy, budget) for policy in options.policies for budget in options.budgets)]
    for setting in settings:
        compression(setting, options.every)  # refuse what cannot work before anything is measured
    if options.train is not None:
        from benchmarks.sparse_training import compare

        return compare(options)
    if options.temperature == 0 and options.samples > 1:
        raise UsageError(f"--temperature 0 gives the same response --samples {options.samples} times; use --samples 1")
    decoder, config = load_decoder(options.model), _config(options)
    held_out = HeldOut(config, options.model)
    rows: list[dict[str, Any]] = []
    if options.repeats:
        speed_settings = [FULL, *((p, b) for p in options.policies for b in options.speed_budgets)]
        rows += _speed(decoder, held_out.prompts, speed_settings, options)
    rows += [_reward(decoder, held_out, setting, options) for setting in settings]
    plot = _plot(rows, options.out)
    path = write_results(
        options.out, "sparse", rows, model=str(options.model), seed=options.seed, tokens=options.tokens,
        sequences=options.sequences, kv_bytes=kv_bytes(decoder, options),
    )  # fmt: skip
    print(f"written {path}" + (f" and {plot}" if plot else ""))
    return 0


def _parser() -> Parser:
    parser = Parser(prog="rollahead bench sparse", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="checkpoint folder")
    add("--prompts", type=Path, required=True, help="jsonl file of held-out problems with question and answer")
    add("--out", type=Path, default=Path("runs/bench-sparse"))
    add("--policies", type=names, default=["r-kv", "snapkv", "sinks-window"], help="comma-separated")
    add("--budgets", type=integers(), default=[32, 48, 64, 96, 128], help="tokens kept, for the rewards and --train")
    add("--every", type=at_least(1), default=16, help="tokens between two compressions, for the rewards and --train")
    add("--problems", type=at_least(1), default=128, help="held-out problems")
    add("--samples", type=at_least(1), default=2, help="responses to each problem")
    add("--max-new-tokens", type=at_least(1), default=256, help="longest response to a problem")
    add("--temperature", type=temperature, default=1.0)
    add("--seed", type=SEED, default=0)
    add("--threads", type=at_least(0), default=0, help="0: torch's default")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--repeats", type=at_least(0), default=5, help="0: measure rewards alone")
    speed.add_argument("--sequences", type=at_least(1), default=32, help="sequences to generate")
    speed.add_argument("--tokens", type=at_least(1), default=1024, help="new tokens of each")
    speed.add_argument("--speed-budgets", type=integers(), default=[128, 256, 512], help="tokens kept")
    speed.add_argument("--speed-every", type=at_least(1), default=128, help="tokens between two compressions")
    speed.add_argument(
        "--kv-bytes", type=at_least(0), default=0, help="the fixed memory; 0: for a quarter of the sequences"
    )
    train = parser.add_argument_group("training")
    train.add_argument("--train", type=Path, metavar="FILE", help="jsonl file to train on; compares corrected with not")
    train.add_argument("--seeds", type=at_least(1), default=3, help="runs of each arm, with seeds from --seed on")
    train.add_argument("--steps", type=at_least(1), default=60, help="optimiser batches a run")
    train.add_argument("--staleness", type=at_least(0), default=0, help="batches the rollouts are old")
    train.add_argument("--learning-rate", type=float, default=2e-5)
    train.add_argument("--batch-size", type=at_least(1), default=64)
    train.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="the learner's products")
    train.add_argument(
        "--runs", type=at_least(0), default=0, help="at most so many now; the same command goes on; 0: all"
    )
    train.add_argument("--margin", type=float, default=0.03, help="rewards within this are equivalent")
    return parser


def compression(setting: Setting, every: int) -> KVCompression | None:
    """What a setting asks of the generator.

    Raises:
        UsageError: an unknown policy, or a budget that it cannot keep to.
    """
    policy, budget = setting
    return None if setting in (FULL, WAITING) else KVCompression(build({"name": policy}), budget, every)


def _config(options: argparse.Namespace) -> Config:
    config = load_config(None, held_out_settings(options))
    check_config(config)
    return config


def held_out_settings(options: argparse.Namespace) -> list[str]:
    """Overrides that say what is evaluated."""
    file = options.train or options.prompts
    return [
        "task.kind=jsonl", f"task.path={file}", f"task.held_out_path={options.prompts}", f"model.path={options.model}",
        f"sampling.max_new_tokens={options.max_new_tokens}", f"learner.eval_prompts={options.problems}",
        f"learner.eval_samples={options.samples}", f"learner.eval_temperature={options.temperature}",
        f"run.seed={options.seed}",
    ]  # fmt: skip


# ---- speed and memory ------------------------------------------------------------------------------------------------


def kv_bytes(decoder: Decoder, options: argparse.Namespace, prompt: int = 128) -> int:
    """The fixed memory."""
    if options.kv_bytes:
        return int(options.kv_bytes)
    pages = -(-(prompt + options.tokens) // PAGE) + 1
    return max(2, options.sequences // 4) * pages * page_bytes(decoder.config, decoder.dtype)


def _speed(
    decoder: Decoder, prompts: list[np.ndarray], settings: Sequence[Setting], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of every setting with the fixed memory and with memory for all, measured in turns."""
    cases = [("fixed", WAITING), *((memory, setting) for memory in ("fixed", "ample") for setting in settings)]
    found: dict[tuple[str, Setting], list[dict[str, float]]] = {case: [] for case in cases}
    for repeat in range(options.repeats + 1):
        for memory, setting in cases if repeat % 2 else reversed(cases):
            limit = kv_bytes(decoder, options) if memory == "fixed" else 0
            run = _timed(decoder, prompts, setting, limit, repeat, options)
            if repeat:  # the first round warms up
                found[memory, setting].append(run)
    rows = [_speed_row(*case, found) for case in cases]
    for row in rows:
        print(
            f"{row['memory']:<6} {row['policy']:<13} {row['budget']:>4}"
            f"  {row['tokens_per_second']['median']:>7.0f} tokens/s"
            f"  {row['ratio_to_full']['median']:.2f}x full ({row['ratio_to_full']['min']:.2f}-"
            f"{row['ratio_to_full']['max']:.2f})  {row['kv_bytes'] / 2**20:.1f} MiB of KV at the most,"
            f" {row['kv_saving']:.0%} less  {row['at_once']:.1f} sequences at once  {row['preemptions']} preemptions",
            flush=True,
        )
    return rows


def _timed(
    decoder: Decoder,
    prompts: list[np.ndarray],
    setting: Setting,
    limit: int,
    repeat: int,
    options: argparse.Namespace,
) -> dict[str, float]:
    longest = max(map(len, prompts)) + options.tokens
    if longest > decoder.config.max_positions:
        raise UsageError(
            f"--tokens {options.tokens} with a prompt of {longest - options.tokens} tokens exceed the model's "
            f"{decoder.config.max_positions} positions; lower --tokens"
        )
    together = options.sequences
    if setting == WAITING:
        together = max(1, limit // page_bytes(decoder.config, decoder.dtype) // (-(-longest // PAGE) + 1))
    generator = NativeGenerator(
        decoder,
        max_sequences=together,
        max_length=longest,
        stop_token_ids=(),
        kv_bytes=limit,
        kv_compression=compression(setting, options.speed_every),
    )
    sampling = SamplingParams(temperature=options.temperature, max_new_tokens=options.tokens)
    began, at_once, steps = time.perf_counter(), 0, 0
    for index in range(options.sequences):
        prompt = prompts[(repeat * options.sequences + index) % len(prompts)]
        generator.add(GroupRequest(index, prompt, sampling, (1_000_003 * (options.seed + repeat) + index,)))
    while generator.has_work():
        before = generator.stats().verifications
        generator.step()
        at_once, steps = at_once + generator.stats().verifications - before, steps + 1
    seconds, stats = time.perf_counter() - began, generator.stats()
    return {
        "seconds": seconds, "tokens": stats.generated_tokens, "kv_bytes": generator.kv_bytes,
        "preemptions": stats.preemptions, "compressions": stats.compressions, "at_once": at_once / steps,
    }  # fmt: skip


def _speed_row(
    memory: str, setting: Setting, found: dict[tuple[str, Setting], list[dict[str, float]]]
) -> dict[str, Any]:
    """Ratios are to the faster of the settings that keep everything."""
    runs = found[memory, setting]
    known = [speeds_of(found[memory, s]) for s in (FULL, WAITING) if (memory, s) in found]
    speeds, fulls = speeds_of(runs), max(known, key=statistics.median)
    full = found[memory, FULL]
    peak = max(r["kv_bytes"] for r in runs)
    return {
        "question": "speed", "memory": memory, "policy": setting[0], "budget": setting[1], "repeats": len(runs),
        "tokens": runs[0]["tokens"], "seconds": spread(r["seconds"] for r in runs), "tokens_per_second": spread(speeds),
        "ratio_to_full": spread(a / b for a, b in zip(speeds, fulls, strict=True)), "kv_bytes": peak,
        "kv_saving": 1 - peak / max(r["kv_bytes"] for r in full),
        "at_once": statistics.median(r["at_once"] for r in runs),
        "preemptions": statistics.median(r["preemptions"] for r in runs),
        "compressions": statistics.median(r["compressions"] for r in runs),
    }  # fmt: skip


def speeds_of(runs: Sequence[dict[str, float]]) -> list[float]:
    """Tokens a second."""
    return [run["tokens"] / run["seconds"] for run in runs]


# ---- reward ----------------------------------------------------------------------------------------------------------


def _reward(decoder: Decoder, held_out: HeldOut, setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    generator = NativeGenerator(
        decoder, max_sequences=options.sequences, kv_compression=compression(setting, options.every)
    )
    scored = held_out.sample(generator)
    by_problem: dict[int, list[float]] = {}
    for _, sample, reward in scored:
        by_problem.setdefault(sample.group, []).append(reward)
    means = [statistics.fmean(rewards) for rewards in by_problem.values()]  # responses to one are not independent
    row = {
        "question": "reward", "policy": setting[0], "budget": setting[1], "every": options.every,
        "reward": statistics.fmean(means), "standard_error": standard_error(means),
        "responses": len(scored), "kv_bytes": generator.kv_bytes,
        "response_length": statistics.fmean(len(sample.token_ids) for _, sample, _ in scored),
        **mismatch(decoder, scored, options.temperature),
    }  # fmt: skip
    print(
        f"{row['policy']:<13} {row['budget']:>4}  reward {row['reward']:.3f} +- {row['standard_error']:.3f}"
        f"  compressed {row['compressed_tokens']:.0%} of the tokens, k3 {row['k3']:.4f}, outside the band"
        f" {row['outside_band']:.1%}, vetoed {row['vetoed']:.1%}",
        flush=True,
    )
    return row


def mismatch(decoder: Decoder, scored: Sequence[Scored], temperature: float) -> dict[str, float]:
    """How far the sampler is from the dense policy, xi = pi / mu of every token: mean k3, share outside [0.5, 1.5], and
    share of responses with a token below 1e-4."""
    logs, compressed, vetoed = [], [], []
    for prompt, sample, _ in scored:
        dense = dense_logprobs(decoder, prompt, sample.token_ids, temperature)
        logs.append(dense - sample.logprobs.astype(np.float64))
        compressed.append(sample.samplers == Sampler.COMPRESSED_KV)
        vetoed.append(bool((np.exp(logs[-1]) < 1e-4).any()))
    log = np.concatenate(logs)
    ratio = np.exp(log)
    return {
        "compressed_tokens": float(np.concatenate(compressed).mean()),
        "k3": float((ratio - 1 - log).mean()),
        "outside_band": float(((ratio < 0.5) | (ratio > 1.5)).mean()),
        "vetoed": statistics.fmean(vetoed),
    }


@torch.no_grad()
def dense_logprobs(decoder: Decoder, prompt: np.ndarray, response: np.ndarray, temperature: float) -> np.ndarray:
    """float64 [T] of a response's tokens with every key in sight; of greedy ones at temperature 1, as recorded."""
    text = np.concatenate([prompt, response])[:-1]
    pages = -(-len(text) // PAGE)
    cache = KVCache(decoder.config, decoder.dtype, decoder.device, pages)
    plan = cache.plan(np.arange(pages)[None], np.zeros(1, np.int64), np.array([len(text)]))
    hidden = decoder.forward(torch.from_numpy(text).to(decoder.device), plan, cache)[len(prompt) - 1 :]
    laws = (decoder.logits(hidden).double() / (temperature or 1.0)).log_softmax(-1)
    return laws.gather(1, torch.from_numpy(response).to(decoder.device)[:, None])[:, 0].cpu().numpy()


def _plot(rows: Sequence[dict[str, Any]], out: Path) -> Path | None:
    """sparse.png: reward against budget, and speed against peak memory; None without matplotlib."""
    pyplot = plots.pyplot()
    if pyplot is None:
        return None

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    rewards = [row for row in rows if row["question"] == "reward"]
    for policy in dict.fromkeys(row["policy"] for row in rewards if row["policy"] != "full"):
        mine = [row for row in rewards if row["policy"] == policy]
        left.errorbar(
            [r["budget"] for r in mine], [r["reward"] for r in mine], [r["standard_error"] for r in mine],
            label=policy, marker="o",
        )  # fmt: skip
    for row in rewards:
        if row["policy"] == "full":
            left.axhline(row["reward"], color="0.5", linestyle="--", label="full cache")
    left.set(xlabel="budget (tokens)", ylabel="held-out reward")
    left.legend()
    for row in rows:
        if row["question"] == "speed":
            name = row["policy"] if not row["budget"] else f"{row['policy']} {row['budget']}"
            x, y = row["kv_bytes"] / 2**20, row["tokens_per_second"]["median"]
            right.scatter(x, y, marker="o" if row["memory"] == "fixed" else "x", color="C0")
            right.annotate(name, (x, y), fontsize=7)
    right.set(xlabel="peak KV (MiB); o fixed memory, x ample", ylabel="tokens a second")
    figure.tight_layout()
    path = out / "sparse.png"
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
