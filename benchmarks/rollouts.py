"""Tokens a second of rollouts: drafters against plain decoding, and against transformers and vLLM.

    rollahead bench rollouts --model DIR --prompts FILE,FILE --batch 1,4,16 --drafters none,suffix-automaton@8 \\
        --peers transformers,vllm --tokens 96 --out DIR

Systems run in processes of their own, in turns, with the same prompts, sampling and number of tokens. Drafters of all
systems remember the rounds before of the same file and batch size. vLLM may be in another environment (--vllm-python).
"""

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.bandwidth import read_bandwidth
from benchmarks.drafter_choice import and_length, check, drafters, short_name
from benchmarks.options import SEED, Parser, at_least, files, integers, names, temperature
from benchmarks.random_model import checkpoint
from benchmarks.results import spread, write_results
from benchmarks.rollout_systems import VLLM_SYSTEM, Answer, Job, Timing
from benchmarks.rollout_vllm import environment, find_vllm
from pipeline.errors import RunFailed, UsageError
from pipeline.models.config import ModelConfig
from pipeline.models.precision import choose

PEER_DRAFTERS = {"transformers": ("none", "prompt-lookup"), "vllm": ("none", "ngram", "suffix")}
Configuration = tuple[str, str]
"""system, drafter or drafter@longest draft"""
Prompts = dict[str, list[list[int]]]
"""token ids by the file they are of"""


class _Line(msgspec.Struct):
    question: str


def main(arguments: list[str]) -> int:
    """Measures, prints a table, writes `results.json`; the exit code."""
    options = _parser().parse_args(arguments)
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    model = checkpoint(options.model, options.out / "models")
    _complete(options)
    for batch in options.batch:
        _configurations(options, batch)  # refuse what is unknown before anything is measured
    prompts = _prompts(options, model)
    length, positions = _longest(prompts) + options.tokens, ModelConfig.from_folder(model).max_positions
    if length > positions:
        raise UsageError(
            f"--tokens {options.tokens} behind the longest prompt makes {length} tokens, the model has {positions} "
            "positions; give fewer"
        )
    bandwidth = read_bandwidth()
    rows: list[dict[str, Any]] = []
    workers, read = _Workers(model, threads, options), 0
    try:
        for (label, chosen), batch in itertools.product(prompts.items(), options.batch):
            configurations = _configurations(options, batch)
            timings = _interleaved(workers, configurations, options, batch, chosen, length)
            memory = {
                c: _weighed(workers, c, timings[c], _job(options, c[1], batch, chosen, length, 0)) for c in timings
            }
            read = max(read, *(timing.read_bytes for timing in memory.values()))
            rows += [{"prompts": label, **row} for row in _rows(timings, memory, options, batch)]
            _print(rows[-len(configurations) :])
    finally:
        workers.stop()
    path = write_results(
        options.out, "rollouts", rows, model=str(options.model), seed=options.seed, threads=threads,
        same_prompts=options.same_prompts, vllm_compiled=bool(options.vllm) and not options.vllm_eager,
        dtype_measured=dict(choose(ModelConfig.from_folder(model), torch.device("cpu")).seconds),
        bandwidth_bytes_per_second=bandwidth, bound_tokens_per_second_at_batch_1=bandwidth / read,
    )  # fmt: skip
    print(f"written {path}; {bandwidth / 1e9:.1f} GB/s read: at most {bandwidth / read:.0f} tokens/s at batch 1")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="rollahead bench rollouts", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="checkpoint folder, or random-60m, random-LAYERSxHIDDENxVOCAB")
    parser.add_argument(
        "--prompts", type=files, default=[], help="jsonl files with a field `question`; without them random tokens"
    )
    parser.add_argument("--batch", type=integers(), default=[1, 4, 16], help="sequences at once, for example 1,4,16")
    parser.add_argument(
        "--drafters",
        type=drafters,
        default=["none", "suffix-automaton"],
        help="comma-separated names or tables {name = ..., option = ...}; with @8 behind: drafts of up to 8 tokens",
    )
    parser.add_argument("--peers", type=names, default=[], help="transformers, vllm")
    parser.add_argument("--vllm-python", type=Path, metavar="PATH", help="Python of an environment with vLLM")
    parser.add_argument(
        "--vllm-drafters", type=names, default=[], help="vLLM's own: none, ngram, suffix, or for example ngram@2"
    )
    parser.add_argument(
        "--vllm-eager", action="store_true", help="vLLM is not compiled: it starts sooner, to try a command out"
    )
    parser.add_argument(
        "--same-prompts", action="store_true", help="rounds repeat the prompts with other seeds, as epochs do"
    )
    parser.add_argument("--waves", type=at_least(1), default=3, help="sequences a round, in batches")
    parser.add_argument("--tokens", type=at_least(1), default=96, help="new tokens a sequence")
    parser.add_argument("--temperature", type=temperature, default=1.0)
    parser.add_argument("--group-size", type=at_least(1), default=8, help="samples a prompt")
    parser.add_argument("--max-draft-tokens", type=at_least(1), default=4)
    parser.add_argument("--repeats", type=at_least(1), default=5)
    parser.add_argument("--threads", type=at_least(0, 1024), default=0, help="of each system; 0: torch's default")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-rollouts"))
    return parser


def _complete(options: argparse.Namespace) -> None:
    """What follows from the environment of vLLM's, where it is asked for."""
    options.vllm = find_vllm(options.vllm_python) if "vllm" in options.peers else None
    if not options.vllm_drafters:
        options.vllm_drafters = list(PEER_DRAFTERS["vllm"])
        if options.vllm is not None and not options.vllm.suffix:
            options.vllm_drafters.remove("suffix")
            print(
                f"vLLM's suffix decoding is left out: {options.vllm.python} has no arctic-inference; "
                "pip install --no-deps arctic-inference==0.3.0 there"
            )
    for drafter in options.vllm_drafters:
        if drafter.partition("@")[0] not in PEER_DRAFTERS["vllm"]:
            raise UsageError(f"--vllm-drafters {drafter} is unknown; known are {', '.join(PEER_DRAFTERS['vllm'])}")
    for drafter in options.drafters:
        check(drafter)
    for drafter in options.vllm_drafters:
        and_length(drafter)


def _prompts(options: argparse.Namespace, model: Path) -> Prompts:
    """Of each file as many as the largest batch and the rounds use."""
    count = _groups(options, max(options.batch)) * (1 if options.same_prompts else options.repeats + 1)
    if not options.prompts:
        vocabulary = ModelConfig.from_folder(model).vocab_size
        generator = torch.Generator().manual_seed(options.seed)
        return {"random": torch.randint(3, vocabulary, (count, 64), generator=generator).tolist()}
    from pipeline.models.tokenizer import Tokenizer

    questions = {os.path.relpath(path): _questions(path) for path in options.prompts}
    tokenizer = Tokenizer(model)
    return {
        name: [tokenizer.encode(f"Question: {q}\nAnswer:") for q in itertools.islice(itertools.cycle(asked), count)]
        for name, asked in questions.items()
    }


def _questions(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_bytes().splitlines() if line.strip()]
        questions = [msgspec.json.decode(line, type=_Line).question for line in lines]
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(f"--prompts {path}: {error}; give lines of JSON with a text as field question") from error
    if not questions:
        raise UsageError(f"--prompts {path} is empty; give lines of JSON with a field question")
    return questions


def _groups(options: argparse.Namespace, batch: int) -> int:
    """Prompts a round: `--waves` times as many samples as there are places, so that places are filled again."""
    return -(-max(batch * options.waves, options.group_size) // options.group_size)


def _longest(prompts: Prompts) -> int:
    return max(len(prompt) for chosen in prompts.values() for prompt in chosen)


def _configurations(options: argparse.Namespace, batch: int) -> list[Configuration]:
    found = [("rollahead", drafter) for drafter in options.drafters]
    for peer in options.peers:
        if peer not in PEER_DRAFTERS:
            raise UsageError(f"--peers {peer} is unknown; known are {', '.join(PEER_DRAFTERS)}")
        drafters = options.vllm_drafters if peer == "vllm" else PEER_DRAFTERS[peer]
        # transformers looks drafts up for one sequence at a time
        found += [(peer, d) for d in drafters if d == "none" or peer != "transformers" or batch == 1]
    if "vllm" in options.peers:
        found += [(VLLM_SYSTEM, drafter) for drafter in options.drafters if drafter != "none"]
    return found


def _interleaved(
    workers: "_Workers",
    configurations: Sequence[Configuration],
    options: argparse.Namespace,
    batch: int,
    prompts: list[list[int]],
    max_length: int,
) -> dict[Configuration, list[Timing]]:
    """Every configuration once a repeat, in an order that turns round; the first round warms up and is not counted.

    The native generator's own configurations take turns of 50 milliseconds within a round (`benchmarks.turns`).
    """
    native = [c for c in configurations if c[0] == "rollahead"]
    runs = [native, *([c] for c in configurations if c not in native)]
    timings: dict[Configuration, list[Timing]] = {configuration: [] for configuration in configurations}
    for repeat in range(options.repeats + 1):
        for together in runs if repeat % 2 else reversed(runs):
            jobs = [_job(options, drafter, batch, prompts, max_length, repeat) for _, drafter in together]
            found = workers[together[0]].run(jobs) if together else []
            for configuration, timing in zip(together, found, strict=True):
                if repeat:
                    timings[configuration].append(timing)
    return timings


def _job(
    options: argparse.Namespace, drafter: str, batch: int, prompts: list[list[int]], max_length: int, repeat: int
) -> Job:
    groups = _groups(options, batch)
    first = 0 if options.same_prompts else repeat * groups
    return Job(
        drafter=drafter, batch=batch, most=max(options.batch), prompts=prompts[first : first + groups],
        group_size=options.group_size, tokens=options.tokens, max_length=max_length, fresh=repeat == 0,
        temperature=options.temperature, max_draft_tokens=options.max_draft_tokens,
        seed=options.seed * 1000 + repeat,
    )  # fmt: skip


def _weighed(workers: "_Workers", configuration: Configuration, timed: list[Timing], job: Job) -> Timing:
    """A run that measures memory; vLLM, which takes its memory at its start, says in every run what it knows."""
    if configuration[0] in ("vllm", VLLM_SYSTEM):
        return timed[-1]
    return workers[configuration].run([msgspec.structs.replace(job, measure_memory=True)])[0]


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
            "drafter": short_name(drafter) if system in ("rollahead", VLLM_SYSTEM) else drafter,
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
            f"{'/'.join(Path(row['prompts']).with_suffix('').parts[-2:])} batch {row['batch']:<3}"
            f" {row['system']:<12} {'in ' + row['generator']:<16} {row['drafter']:<20}"
            f" {row['tokens_per_second']['median']:>8.0f} tokens/s"
            + (f"  plain {plain['median']:.2f}x ({plain['min']:.2f}-{plain['max']:.2f})" if plain else "")
            + (f"  {accepted:.2f} tokens/verification" if accepted else "")
            + "".join(f"  {ratio}" for ratio in ratios)
            + (f"  outside the forward pass {outside['median']:.0%}" if outside else "")
            + (f"  {total / 2**20:.0f} MiB" if total else ""),
            flush=True,
        )


class _Workers:
    """The processes that run systems: one each, of vLLM's one a drafter; each is started when it is first asked for."""

    def __init__(self, model: Path, threads: int, options: argparse.Namespace) -> None:
        self._model, self._threads, self._vllm, self._eager = model, threads, options.vllm, options.vllm_eager
        self._workers: dict[Configuration, _Worker] = {}

    def __getitem__(self, configuration: Configuration) -> "_Worker":
        system, drafter = configuration
        in_vllm = system in ("vllm", VLLM_SYSTEM)
        key = (system, drafter if in_vllm else "")
        if key not in self._workers:
            python = str(self._vllm.python) if in_vllm else sys.executable
            variables = environment(self._vllm, self._threads, self._eager) if in_vllm else None
            self._workers[key] = _Worker(python, system, self._model, self._threads, variables)
        return self._workers[key]

    def stop(self) -> None:
        for worker in self._workers.values():
            worker.stop()


class _Worker:
    """A process that runs one system."""

    def __init__(
        self, python: str, system: str, model: Path, threads: int, variables: Mapping[str, str] | None
    ) -> None:
        self._system = system
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.rollout_systems", system, str(model.absolute()), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1], text=True, env=variables,
        )  # fmt: skip

    def run(self, jobs: Sequence[Job]) -> list[Timing]:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(jobs).decode() + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer below is empty then
        answer = process.stdout.readline()
        if not answer:
            raise RunFailed(f"{self._system} ended with code {process.wait()}; its output is above")
        found = msgspec.json.decode(answer, type=Answer)
        if found.refused:
            raise (UsageError if found.exit_code == 2 else RunFailed)(found.refused)
        return found.timings

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
