"""Tokens a second of rollouts: drafters against plain decoding, and against transformers and vLLM.

    rollahead bench rollouts --model DIR --prompts FILE --batch 1,4,16 --drafters none,suffix-automaton \\
        --peers transformers --tokens 96 --out DIR

Systems run in processes of their own, in turns, with the same prompts, sampling and number of tokens.
"""

import argparse
import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.bandwidth import read_bandwidth
from benchmarks.random_model import checkpoint
from benchmarks.results import spread, write_results
from benchmarks.rollout_systems import SYSTEMS, Job, Timing
from pipeline.errors import RunFailed, UsageError
from pipeline.models.config import ModelConfig
from pipeline.models.precision import choose

PEER_DRAFTERS = {"transformers": ("none", "prompt-lookup"), "vllm": ("none", "ngram", "suffix")}
VLLM_SYSTEM = "rollahead-vllm"
"""our drafters in vLLM's engine, beside the peer vllm"""
Configuration = tuple[str, str]
"""system, drafter"""


def main(arguments: list[str]) -> int:
    """Measures, prints a table, writes `results.json`; the exit code."""
    options = _parser().parse_args(arguments)
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    model = checkpoint(options.model, options.out / "models")
    for batch in options.batch:
        _configurations(options, batch)  # refuse what is unknown before anything is measured
    prompts = _prompts(options, model)
    bandwidth = read_bandwidth()
    systems = ["rollahead", *options.peers, *([VLLM_SYSTEM] if "vllm" in options.peers else [])]
    rows: list[dict[str, Any]] = []
    read = 0
    workers = {system: _Worker(system, model, threads) for system in systems}
    try:
        for batch in options.batch:
            configurations = _configurations(options, batch)
            timings = _interleaved(workers, configurations, options, batch, prompts)
            memory = {c: workers[c[0]].run(_job(options, c[1], batch, prompts, 0, True)) for c in configurations}
            read = max(timing.read_bytes for timing in memory.values())
            rows += _rows(timings, memory, options, batch)
            _print(rows[-len(configurations) :])
    finally:
        for worker in workers.values():
            worker.stop()
    path = write_results(
        options.out, "rollouts", rows, model=str(options.model), seed=options.seed, threads=threads,
        dtype_measured=dict(choose(ModelConfig.from_folder(model), torch.device("cpu")).seconds),
        bandwidth_bytes_per_second=bandwidth, bound_tokens_per_second_at_batch_1=bandwidth / read,
    )  # fmt: skip
    print(f"written {path}; {bandwidth / 1e9:.1f} GB/s read: at most {bandwidth / read:.0f} tokens/s at batch 1")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rollahead bench rollouts", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="checkpoint folder, or random-60m, random-LAYERSxHIDDENxVOCAB")
    parser.add_argument("--prompts", type=Path, help="jsonl file with a field `question`; without it random tokens")
    parser.add_argument("--batch", type=_numbers, default=[1, 4, 16], help="sequences at once, for example 1,4,16")
    parser.add_argument("--drafters", type=_names, default=["none", "suffix-automaton"], help="comma-separated")
    parser.add_argument("--peers", type=_names, default=[], help="transformers, vllm")
    parser.add_argument("--tokens", type=int, default=96, help="new tokens a sequence")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--group-size", type=int, default=8, help="samples a prompt")
    parser.add_argument("--max-draft-tokens", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of each system; 0: torch's default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-rollouts"))
    return parser


def _prompts(options: argparse.Namespace, model: Path) -> list[list[int]]:
    """As many prompts as the largest batch and the repeats use."""
    count = -(-max(max(options.batch), options.group_size) // options.group_size) * (options.repeats + 1)
    if options.prompts is None:
        vocabulary = ModelConfig.from_folder(model).vocab_size
        generator = torch.Generator().manual_seed(options.seed)
        return torch.randint(3, vocabulary, (count, 64), generator=generator).tolist()
    from pipeline.models.tokenizer import Tokenizer

    tokenizer = Tokenizer(model)
    try:
        lines = options.prompts.read_bytes().splitlines()
        questions = [msgspec.json.decode(line)["question"] for line in itertools.islice(itertools.cycle(lines), count)]
    except (OSError, msgspec.MsgspecError, KeyError, TypeError) as error:
        raise UsageError(f"--prompts {options.prompts}: {error!r}; give lines of JSON with a field question") from error
    return [tokenizer.encode(f"Question: {question}\nAnswer:") for question in questions]


def _configurations(options: argparse.Namespace, batch: int) -> list[Configuration]:
    found = [("rollahead", drafter) for drafter in options.drafters]
    for peer in options.peers:
        if peer not in PEER_DRAFTERS:
            raise UsageError(f"--peers {peer} is unknown; known are {', '.join(PEER_DRAFTERS)}")
        # transformers looks drafts up for one sequence at a time
        found += [(peer, d) for d in PEER_DRAFTERS[peer] if d == "none" or peer != "transformers" or batch == 1]
    if importlib.util.find_spec("arctic_inference") is None:
        found = [c for c in found if c != ("vllm", "suffix")]  # vLLM's suffix decoding is that package
    if "vllm" in options.peers:
        found += [(VLLM_SYSTEM, drafter) for drafter in options.drafters if drafter != "none"]
    return found


def _interleaved(
    workers: dict[str, "_Worker"],
    configurations: Sequence[Configuration],
    options: argparse.Namespace,
    batch: int,
    prompts: list[list[int]],
) -> dict[Configuration, list[Timing]]:
    """Every configuration once a repeat, in an order that turns round; the first round warms up and is not counted."""
    timings: dict[Configuration, list[Timing]] = {configuration: [] for configuration in configurations}
    for repeat in range(options.repeats + 1):
        for system, drafter in configurations if repeat % 2 else reversed(configurations):
            timing = workers[system].run(_job(options, drafter, batch, prompts, repeat))
            if repeat:
                timings[system, drafter].append(timing)
    return timings


def _job(
    options: argparse.Namespace,
    drafter: str,
    batch: int,
    prompts: list[list[int]],
    repeat: int,
    measure_memory: bool = False,
) -> Job:
    """Of a repeat; the first, number 0, is a short one to warm up, or the one that measures memory."""
    groups = -(-max(batch, options.group_size) // options.group_size)
    return Job(
        drafter=drafter, batch=batch, prompts=prompts[repeat * groups : (repeat + 1) * groups],
        group_size=options.group_size,
        tokens=options.tokens if repeat or measure_memory else min(16, options.tokens),
        temperature=options.temperature, max_draft_tokens=options.max_draft_tokens,
        seed=options.seed * 1000 + repeat, measure_memory=measure_memory,
    )  # fmt: skip


def _rows(
    timings: dict[Configuration, list[Timing]],
    memory: dict[Configuration, Timing],
    options: argparse.Namespace,
    batch: int,
) -> list[dict[str, Any]]:
    speeds = {c: [t.tokens / t.seconds for t in found] for c, found in timings.items()}
    best = {}
    for peer in options.peers:
        best[peer] = max((c for c in timings if c[0] == peer), key=lambda c: spread(speeds[c])["median"])
    rows = []
    for (system, drafter), found in timings.items():
        mine = speeds[system, drafter]
        plain = speeds.get(("vllm" if system == VLLM_SYSTEM else system, "none"))
        drafted, held = sum(t.drafted for t in found), memory[system, drafter]
        verifications = sum(t.verifications for t in found)
        rows.append({
            "system": "rollahead" if system == VLLM_SYSTEM else system,
            "generator": {"rollahead": "native", VLLM_SYSTEM: "vllm"}.get(system, system),
            "drafter": drafter,
            "batch": batch,
            "temperature": options.temperature,
            "dtype": found[-1].dtype or None,
            "tokens": found[-1].tokens,
            "seconds": spread(t.seconds for t in found),
            "tokens_per_second": spread(mine),
            "ratio_to_plain": _ratio(mine, plain),
            "ratio_to_peer": {peer: _ratio(mine, speeds[best[peer]]) for peer in options.peers if peer != system},
            "peer_configuration": {peer: best[peer][1] for peer in options.peers},
            "acceptance_rate": sum(t.accepted for t in found) / drafted if drafted else None,
            "acceptance_by_depth": _by_depth(found),
            "tokens_per_verification": sum(t.tokens for t in found) / verifications if verifications else None,
            "outside_forward": _known([t.outside_forward for t in found]),
            "start_seconds": _known([t.start_seconds for t in found]),
            "memory": _memory(held),
        })  # fmt: skip
    return rows


def _by_depth(found: Sequence[Timing]) -> list[float] | None:
    """Share of drafts accepted at each depth, of those accepted up to there; None where the system does not say."""
    tried, accepted = (
        [list(counts) for counts in itertools.zip_longest(*(getattr(t, at) for t in found), fillvalue=0)]
        for at in ("tried_at", "accepted_at")
    )
    return [sum(a) / sum(t) for a, t in zip(accepted, tried, strict=True)] or None


def _memory(held: Timing) -> dict[str, int | None]:
    """Bytes; `total_bytes` is what the model takes altogether, beside the program."""
    known = held.workspace_bytes is not None and held.weights_bytes > 0
    return {
        "weights_bytes": held.weights_bytes,
        "kv_bytes": held.kv_bytes,
        "workspace_bytes": held.workspace_bytes,
        "total_bytes": held.weights_bytes + held.kv_bytes + (held.workspace_bytes or 0) if known else None,
        "resident_bytes": held.resident_bytes,
    }


def _ratio(mine: list[float], other: list[float] | None) -> dict[str, float] | None:
    """Of runs made in the same round."""
    return spread(a / b for a, b in zip(mine, other, strict=True)) if other else None


def _known(values: list[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return spread(known) if known else None


def _print(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        ratios = [f"{peer} {ratio['median']:.2f}x" for peer, ratio in row["ratio_to_peer"].items()]
        plain = row["ratio_to_plain"]
        accepted, outside, total = row["tokens_per_verification"], row["outside_forward"], row["memory"]["total_bytes"]
        print(
            f"batch {row['batch']:<3} {row['system']:<12} {row['drafter']:<20}"
            f" {row['tokens_per_second']['median']:>8.0f} tokens/s"
            + (f"  plain {plain['median']:.2f}x ({plain['min']:.2f}-{plain['max']:.2f})" if plain else "")
            + (f"  {accepted:.2f} tokens/verification" if accepted else "")
            + "".join(f"  {ratio}" for ratio in ratios)
            + (f"  outside the forward pass {outside['median']:.0%}" if outside else "")
            + (f"  {total / 2**20:.0f} MiB" if total else ""),
            flush=True,
        )


class _Worker:
    """A process that runs one system."""

    def __init__(self, system: str, model: Path, threads: int) -> None:
        if system not in SYSTEMS:
            raise UsageError(f"--peers {system} is unknown; known are {', '.join(PEER_DRAFTERS)}")
        self._system = system
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.rollout_systems", system, str(model), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1], text=True,
        )  # fmt: skip

    def run(self, job: Job) -> Timing:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(job).decode() + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer below is empty then
        answer = process.stdout.readline()
        if not answer:
            raise RunFailed(f"{self._system} ended with code {process.wait()}; its output is above")
        return msgspec.json.decode(answer, type=Timing)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
