"""What `rollahead bench rollouts` compares, each run in a process of its own (`python -m benchmarks.rollout_systems`).

A process loads its model once, then answers lines of JSON on standard input: a list of `Job` in, one of `Timing` out.
"""

import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from benchmarks.drafter_choice import and_length
from benchmarks.memory import Growth
from benchmarks.results import resident_bytes
from benchmarks.turns import take_turns
from pipeline.engine.generator import FinishedSample
from pipeline.errors import RollaheadError

VLLM_SYSTEM = "rollahead-vllm"
"""our drafters in vLLM's engine, beside the peer vllm"""


class Job(msgspec.Struct, kw_only=True):
    """One timed run: `tokens` new ones for each of the prompts, `batch` at a time, none ended early."""

    drafter: str
    batch: int
    most: int
    """largest batch that will be asked for"""
    max_length: int
    """tokens of the longest prompt of all runs and its response"""
    fresh: bool
    """whether drafters forget what they saw in earlier runs"""
    prompts: list[list[int]]
    group_size: int
    """samples of each prompt"""
    tokens: int
    temperature: float
    max_draft_tokens: int
    seed: int
    measure_memory: bool = False
    """then the time means nothing"""


class Timing(msgspec.Struct, kw_only=True):
    """What a run took and made."""

    seconds: float
    tokens: int
    start_seconds: float = 0.0
    """once an engine, before its first prompt, the model's loading apart: an arbiter measures what verifying costs"""
    drafted: int = 0
    accepted: int = 0
    tried_at: list[int] = []
    """drafts that had a first token; a second one, after an accepted first; ..."""
    accepted_at: list[int] = []
    """of these, where it was accepted"""
    verifications: int = 0
    outside_forward: float | None = None
    """share of the time that was not the model's forward pass"""
    dtype: str = ""
    """that the model was computed in; empty: not known"""
    weights_bytes: int = 0
    read_bytes: int = 0
    """of the weights, what every forward pass reads; 0: not known"""
    kv_bytes: int = 0
    workspace_bytes: int | None = None
    """most that the run took beside weights, keys and values; None: not measured"""
    resident_bytes: int = 0
    """peak of the process"""


class Answer(msgspec.Struct, kw_only=True):
    """To jobs."""

    timings: list[Timing] = []
    refused: str = ""
    """why there are none"""
    exit_code: int = 2
    """of a refusal"""


class System(Protocol):
    def run(self, job: Job) -> Timing: ...


def drafter_and_length(job: Job) -> tuple[str, int]:
    """Of `drafter` or `drafter@longest draft`."""
    drafter, length = and_length(job.drafter)
    return drafter, job.max_draft_tokens if length is None else length


class Rollahead:
    """The native generator."""

    def __init__(self, model: Path) -> None:
        from pipeline.models.checkpoint import load_decoder

        self._decoder = load_decoder(model)
        self._generators: dict[str, Any] = {}
        self._groups = itertools.count()

    def _generator(self, job: Job) -> Any:
        """One for each drafter, which remembers what it saw until a job is fresh."""
        from drafters.registry import written
        from pipeline.engine.native.generator import NativeGenerator

        if job.fresh and job.drafter in self._generators:
            self._generators.pop(job.drafter).close()
        if job.drafter not in self._generators:
            name, length = drafter_and_length(job)
            self._generators[job.drafter] = NativeGenerator(
                self._decoder, drafter=written(name), max_sequences=job.batch, max_draft_tokens=length,
                max_length=job.max_length, stop_token_ids=(), stagger=True,
            )  # fmt: skip
        return self._generators[job.drafter]

    def run(self, job: Job) -> Timing:
        return self.run_together([job])[0]

    def run_together(self, jobs: Sequence[Job]) -> list[Timing]:
        """Jobs of different drafters in short turns; each one's seconds are those of its own turns."""
        growth = Growth() if jobs[0].measure_memory else None
        generators, starts = [], []
        for job in jobs:
            began = time.perf_counter()
            generators.append(self._generator(job))
            self._add(generators[-1], job)
            starts.append(time.perf_counter() - began)
        before = [generator.stats() for generator in generators]
        turns = take_turns(generators)
        return [
            self._timing(generator, was, start, seconds, done, growth)
            for generator, was, start, (seconds, done) in zip(generators, before, starts, turns, strict=True)
        ]

    def _add(self, generator: Any, job: Job) -> None:
        from pipeline.engine.generator import GroupRequest
        from pipeline.messages import SamplingParams

        sampling = SamplingParams(temperature=job.temperature, max_new_tokens=job.tokens)
        for i, prompt in enumerate(job.prompts):
            seeds = tuple(job.seed * 1_000_003 + i * job.group_size + s for s in range(job.group_size))
            generator.add(GroupRequest(next(self._groups), np.array(prompt, np.int64), sampling, seeds))

    def _timing(
        self, generator: Any, before: Any, start: float, seconds: float, done: list[FinishedSample],
        growth: Growth | None,
    ) -> Timing:  # fmt: skip
        stats = generator.stats()
        tried_at, accepted_at = _depths(done)
        return Timing(
            seconds=seconds,
            start_seconds=start,
            tokens=stats.generated_tokens - before.generated_tokens,
            drafted=stats.drafted - before.drafted,
            accepted=stats.accepted - before.accepted,
            tried_at=tried_at,
            accepted_at=accepted_at,
            verifications=stats.verifications - before.verifications,
            outside_forward=1 - (stats.forward_seconds - before.forward_seconds) / seconds,
            dtype=str(self._decoder.dtype).removeprefix("torch."),
            weights_bytes=self._decoder.bytes,
            read_bytes=self._decoder.read_bytes,
            kv_bytes=generator.kv_bytes,
            workspace_bytes=_workspace(growth, generator.kv_bytes),
            resident_bytes=resident_bytes(peak=True),
        )


def _depths(done: list[FinishedSample]) -> tuple[list[int], list[int]]:
    """Drafts tried and accepted at each depth, of all samples and drafters."""
    counts = [found for sample in done for found in sample.drafters.values()]
    deepest = max((len(found.tried_at) for found in counts), default=0)
    sums = np.zeros((2, deepest), np.int64)
    for found in counts:
        for row, at in enumerate((found.tried_at, found.accepted_at)):
            sums[row, : len(at)] += np.array(at, np.int64)
    return sums[0].tolist(), sums[1].tolist()


def _workspace(growth: Growth | None, kv_bytes: int) -> int | None:
    """What of a run's memory was neither keys nor values."""
    most = growth.most() if growth else None
    return None if most is None else max(0, most - kv_bytes)


class Transformers:
    """`generate` of transformers, batched; with prompt lookup where it allows the batch size (1)."""

    def __init__(self, model: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()

    def run(self, job: Job) -> Timing:
        torch = self._torch
        torch.manual_seed(job.seed)
        rows = [prompt for prompt in job.prompts for _ in range(job.group_size)]
        options: dict[str, Any] = {"do_sample": job.temperature > 0}
        if job.temperature > 0:
            options |= {"temperature": job.temperature, "top_k": 0, "top_p": 1.0}
        if job.drafter != "none":
            options["prompt_lookup_num_tokens"] = max(1, job.max_draft_tokens)
        growth = Growth() if job.measure_memory else None
        made = 0
        start = time.perf_counter()
        with torch.no_grad():
            for first in range(0, len(rows), job.batch):
                batch = rows[first : first + job.batch]
                width = max(map(len, batch))
                ids = torch.tensor([[0] * (width - len(row)) + row for row in batch])
                mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
                out = self._model.generate(
                    ids, attention_mask=mask, min_new_tokens=job.tokens, max_new_tokens=job.tokens,
                    pad_token_id=0, eos_token_id=None, use_cache=True, **options,
                )  # fmt: skip
                made += (out.shape[1] - width) * len(batch)
        seconds = time.perf_counter() - start
        config = self._model.config
        width = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        row_bytes = config.num_key_value_heads * width * next(self._model.parameters()).element_size()
        length = max(map(len, job.prompts)) + job.tokens
        kv_bytes = config.num_hidden_layers * 2 * row_bytes * length * min(job.batch, len(rows))
        return Timing(
            seconds=seconds,
            tokens=made,
            dtype=str(self._model.dtype).removeprefix("torch."),
            weights_bytes=sum(p.numel() * p.element_size() for p in self._model.parameters()),
            kv_bytes=kv_bytes,
            workspace_bytes=_workspace(growth, kv_bytes),
            resident_bytes=resident_bytes(peak=True),
        )


def system_named(name: str, model: Path) -> System:
    """The system of a process: vLLM is imported by its own alone."""
    if name == "rollahead":
        return Rollahead(model)
    if name == "transformers":
        return Transformers(model)
    from benchmarks.rollout_vllm import VLLM, RollaheadVLLM

    return RollaheadVLLM(model) if name == VLLM_SYSTEM else VLLM(model)


def serve(system: str, model: Path, threads: int) -> None:
    """Answers jobs until standard input ends."""
    import torch

    torch.set_num_threads(threads)
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries that print must not spoil the answers
    runner = system_named(system, model)
    for line in sys.stdin:
        jobs = msgspec.json.decode(line, type=list[Job])
        try:
            timings = runner.run_together(jobs) if isinstance(runner, Rollahead) else [runner.run(job) for job in jobs]
            answer = Answer(timings=timings)
        except RollaheadError as error:
            answer = Answer(refused=str(error), exit_code=error.exit_code)
        answers.write(msgspec.json.encode(answer).decode() + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
