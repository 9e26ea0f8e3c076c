"""A training step of the learner against TRL's GRPO trainer: tokens a second and memory, same model, batch and loss.

    rollahead bench learner --what speed --out DIR            both models, both types, five steps each, in turns
    rollahead bench learner --what speed --short --out DIR    one step of a tiny model, to see that it runs

Each system works in a process of its own, one step at a time in turns, so that both meet the same machine. Timed is
the optimiser step on a finished batch: forward, loss, backward, clipping, AdamW; for TRL its own `train()` between
`on_step_begin` and `on_step_end`, padding done beforehand. Both get the same behaviour log-probs and advantages, PPO's
clip and the token mean, and the losses of the first step are compared. TRL runs with and without gradient checkpointing
(its default is with) and at two sizes of micro-batches, and so do we; the ratio of speed is to its fastest setting,
that of memory to its most frugal one. A further setting of ours passes every sample's prompt through the model. Memory
is shown twice: the peak of the whole process, and how far that is above the process with the model loaded and nothing
trained, which leaves out what libraries and weights take on either side.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.options import SEED, Parser, at_least, integers, names
from benchmarks.results import spread, write_results
from pipeline.errors import RunFailed, UsageError

SPEED_BAR, MEMORY_BAR = 1.5, 0.7
GROUP = 8


def measure(arguments: Sequence[str]) -> int:
    """Measures, prints a table, writes `results.json`; the exit code."""
    options = _options(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.models:
            folder = _model_folder(name, Path(temporary))
            batch = Path(temporary) / f"{Path(name).name}.json"
            groups = ragged_batch(options.prompts, options.longest, options.seed)
            _add_logprobs(groups, folder)
            batch.write_text(json.dumps(groups))
            for dtype in options.dtypes:
                rows += _measure(options, name, folder, batch, dtype)
    verdicts = [text for name in options.models for dtype in options.dtypes for text in _verdicts(rows, name, dtype)]
    path = write_results(
        options.out, "learner-speed", rows, model=",".join(options.models), seed=options.seed, verdicts=verdicts,
        threads=options.threads, bars={"tokens_per_second": SPEED_BAR, "memory": MEMORY_BAR},
    )  # fmt: skip
    print("\n".join(["", *verdicts, "", f"written {path}"]))
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="rollahead bench learner --what speed")
    parser.add_argument("--what", choices=["speed"])
    parser.add_argument("--out", type=Path, default=Path("bench/learner-speed"), help="folder of results.json")
    parser.add_argument(
        "--models", type=names, default=["small-body-150k", "even-16k"],
        help="checkpoint folders, or random ones of hidden size 256: small-body-150k (151,936 tokens, 4 layers), "
        "even-16k (16,384 tokens, 8 layers); or tiny",
    )  # fmt: skip
    parser.add_argument("--dtypes", type=names, default=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=at_least(1), default=4, help=f"groups of {GROUP} samples in the batch")
    parser.add_argument("--longest", type=at_least(1), default=512, help="longest response, in tokens")
    parser.add_argument("--steps", type=at_least(1), default=5, help="measured steps of each, after one that is not")
    parser.add_argument(
        "--micro-batch-tokens", type=integers(), default=[2048, 4096], help="our sizes of a micro-batch"
    )
    parser.add_argument("--trl-batches", type=integers(), default=[4, 8], help="TRL's samples a micro-batch")
    parser.add_argument("--threads", type=at_least(0), default=1)
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--short", action="store_true", help="one step of a tiny model in float32")
    if "--short" in arguments:
        parser.set_defaults(models=["tiny"], dtypes=["float32"], steps=1, prompts=2, longest=48, trl_batches=[8],
                            micro_batch_tokens=[4096])  # fmt: skip
    return parser.parse_args(arguments)


def ragged_batch(prompts: int, longest: int, seed: int) -> list[list[dict[str, Any]]]:
    """Groups of samples whose lengths are spread as rollouts' are: log-normal, median a quarter of the longest, the
    tail cut off there. Token ids are below 256, rewards 0 or 1 with both in every group."""
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(prompts):
        prompt = rng.integers(3, 256, rng.integers(longest // 8, longest // 3)).tolist()
        lengths = np.clip(rng.lognormal(np.log(longest / 4), 0.7, GROUP), 8, longest).astype(int)
        rewards = [1.0, 0.0, *rng.integers(0, 2, GROUP - 2).astype(float)]
        groups.append([
            {"prompt": prompt, "response": rng.integers(3, 256, length).tolist(), "reward": reward}
            for length, reward in zip(lengths, rewards, strict=True)
        ])  # fmt: skip
    return groups


def _model_folder(name: str, temporary: Path) -> Path:
    """The named checkpoint, or a random one of the named shape."""
    shapes: dict[str, dict[str, Any]] = {
        "small-body-150k": {
            "vocab_size": 151_936,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
        },
        "even-16k": {
            "vocab_size": 16_384,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 8,
        },
        "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    }
    if name not in shapes:
        if not (Path(name) / "config.json").is_file():
            raise UsageError(f"--models {name} is no checkpoint folder and none of {', '.join(shapes)}")
        return Path(name)
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        **shapes[name], num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
        tie_word_embeddings=True,
    )  # fmt: skip
    folder = temporary / name
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def _add_logprobs(groups: list[list[dict[str, Any]]], folder: Path) -> None:
    """The policy's own log-probs as those of the rollouts: no ratio is clipped and every token has a gradient."""
    import torch

    from learner.linear import times_transposed
    from learner.policy import load_policy

    model = load_policy(folder, "cpu")
    with torch.no_grad():
        for sample in (sample for group in groups for sample in group):
            first = len(sample["prompt"])
            ids = torch.tensor([sample["prompt"] + sample["response"]])
            hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[0, first - 1 :]
            logits = times_transposed(hidden, model.get_output_embeddings().weight)
            sample["logprobs"] = logits.log_softmax(-1).gather(1, ids[0, first:, None])[:, 0].tolist()


class Worker:
    """A system in a process of its own, which trains a step when asked."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.learner_speed_worker", json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.start = self._read()

    def step(self) -> dict[str, Any]:
        """Seconds, CPU seconds, loss, and peak memory so far."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RunFailed(f"the worker of {self.settings['system']} ended with code {self._process.wait()}")


def _settings(options: argparse.Namespace, folder: Path, batch: Path, dtype: str) -> list[dict[str, Any]]:
    common = {"model": str(folder), "batch": str(batch), "dtype": dtype, "threads": options.threads,
              "steps": options.steps + 1}  # fmt: skip
    ours = [
        {
            **common,
            "system": "rollahead",
            "micro_batch_tokens": size,
            "checkpointing": on,
            "share_prompts": share,
        }
        for size in options.micro_batch_tokens
        for on, share in ((False, True), (True, True), (False, False))
        if share or size == options.micro_batch_tokens[-1]
    ]
    theirs = [
        {**common, "system": "trl", "samples": size, "checkpointing": on}
        for size in options.trl_batches
        for on in (False, True)
    ]
    return [*ours, *theirs]


def _measure(options: argparse.Namespace, name: str, folder: Path, batch: Path, dtype: str) -> list[dict[str, Any]]:
    tokens = sum(len(s["prompt"]) + len(s["response"]) for g in json.loads(batch.read_text()) for s in g)
    workers = [Worker(settings) for settings in _settings(options, folder, batch, dtype)]
    try:
        steps = [[worker.step() for worker in workers] for _ in range(options.steps + 1)]
    finally:
        for worker in workers:
            worker.close()
    rows = []
    for index, worker in enumerate(workers):
        measured = [turn[index] for turn in steps[1:]]
        rows.append({
            "model": name, **{k: v for k, v in worker.settings.items() if k not in ("model", "batch")},
            "tokens": tokens,
            "tokens_per_second": spread(tokens / step["seconds"] for step in measured),
            "tokens_per_cpu_second": spread(tokens / step["cpu_seconds"] for step in measured),
            "peak_bytes": measured[-1]["peak_bytes"],
            "step_bytes": measured[-1]["peak_bytes"] - worker.start["idle_bytes"],
            "imported_bytes": worker.start["imported_bytes"],
            "idle_bytes": worker.start["idle_bytes"],
            "first_loss": steps[0][index]["loss"],
        })  # fmt: skip
        print(_line(rows[-1]), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    size = f"{row['micro_batch_tokens']} tokens" if row["system"] == "rollahead" else f"{row['samples']} samples"
    speed = row["tokens_per_second"]
    return (
        f"{Path(row['model']).name:<18} {row['dtype']:<9} {row['system']:<10} {size:<12}"
        f" {_how(row):<14}{speed['median']:8.0f} tokens/s"
        f" ({speed['min']:.0f} to {speed['max']:.0f}), {row['tokens_per_cpu_second']['median']:.0f} a CPU second"
        f"  peak {row['peak_bytes'] / 2**20:5.0f} MiB, {row['step_bytes'] / 2**20:.0f} above idle"
        f"  loss {row['first_loss']:.6f}"
    )


def _how(row: dict[str, Any]) -> str:
    if row["checkpointing"]:
        return "checkpointing"
    return "" if row.get("share_prompts", True) else "prompts apart"


def _verdicts(rows: Sequence[dict[str, Any]], model: str, dtype: str) -> list[str]:
    """Ratios to TRL's best of each, of our fastest setting and of our most frugal one."""
    ours = [r for r in rows if (r["model"], r["dtype"], r["system"]) == (model, dtype, "rollahead")]
    mine, apart = [r for r in ours if r["share_prompts"]], [r for r in ours if not r["share_prompts"]]
    theirs = [r for r in rows if (r["model"], r["dtype"], r["system"]) == (model, dtype, "trl")]
    if not mine or not theirs:
        return []
    loss = statistics.median(r["first_loss"] for r in theirs)
    lines = []
    for row in mine:
        fast, on_cpu = (
            row[key]["median"] / max(r[key]["median"] for r in theirs)
            for key in ("tokens_per_second", "tokens_per_cpu_second")
        )
        process, step = (row[key] / min(r[key] for r in theirs) for key in ("peak_bytes", "step_bytes"))
        lines.append(
            f"{Path(model).name} {dtype}, {row['micro_batch_tokens']} tokens a micro-batch"
            f"{', gradient checkpointing' if row['checkpointing'] else ''}: "
            f"{fast:.2f}x TRL's fastest in tokens/s ({_word(fast >= SPEED_BAR)} {SPEED_BAR}; {on_cpu:.2f}x a CPU "
            f"second), {process:.2f}x its least peak memory ({_word(process <= MEMORY_BAR)} {MEMORY_BAR}), "
            f"{step:.2f}x above the idle model ({_word(step <= MEMORY_BAR)} {MEMORY_BAR}), "
            f"losses differ by {abs(row['first_loss'] - loss):.1e}"
        )
    lines += [
        f"{Path(model).name} {dtype}: a prompt passed once for its samples makes a step "
        f"{same['tokens_per_second']['median'] / row['tokens_per_second']['median']:.2f}x as fast, in "
        f"{same['step_bytes'] / row['step_bytes']:.2f} of the memory above the idle model"
        for row in apart
        for same in mine
        if same["micro_batch_tokens"] == row["micro_batch_tokens"] and not same["checkpointing"]
    ]
    return lines


def _word(held: bool) -> str:
    return "bar held:" if held else "bar not held:"
