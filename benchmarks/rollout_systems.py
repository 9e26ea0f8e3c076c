"""What `rollahead bench rollouts` compares, each run in a process of its own (`python -m benchmarks.rollout_systems`).

A process loads its model once, then answers lines of JSON on standard input: a `Job` in, a `Timing` out.
"""

import sys
import time
from pathlib import Path
from typing import Any, ClassVar, Protocol

import msgspec
import numpy as np

from benchmarks.memory import Growth
from benchmarks.results import resident_bytes
from pipeline.engine.generator import FinishedSample
from pipeline.errors import UsageError

VLLM_KV_BYTES = 1 << 30
"""of keys and values of each of vLLM's engines"""


class Job(msgspec.Struct, kw_only=True):
    """One timed run: `tokens` new ones for each of the prompts, `batch` at a time, none ended early."""

    drafter: str
    batch: int
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


class System(Protocol):
    def run(self, job: Job) -> Timing: ...


class Rollahead:
    """The native generator."""

    def __init__(self, model: Path) -> None:
        from pipeline.models.checkpoint import load_decoder

        self._decoder = load_decoder(model)

    def run(self, job: Job) -> Timing:
        from drafters.registry import build
        from pipeline.engine.generator import GroupRequest
        from pipeline.engine.native.generator import NativeGenerator
        from pipeline.messages import SamplingParams

        sampling = SamplingParams(temperature=job.temperature, max_new_tokens=job.tokens)
        growth = Growth() if job.measure_memory else None
        began = time.perf_counter()
        generator = NativeGenerator(
            self._decoder,
            drafter=build({"name": job.drafter}),
            max_sequences=job.batch,
            max_draft_tokens=job.max_draft_tokens,
            max_length=max(map(len, job.prompts)) + job.tokens,
            stop_token_ids=(),
            stagger=True,
        )
        for i, prompt in enumerate(job.prompts):
            seeds = tuple(job.seed * 1_000_003 + i * job.group_size + s for s in range(job.group_size))
            generator.add(GroupRequest(i, np.array(prompt, np.int64), sampling, seeds))
        start = time.perf_counter()
        done: list[FinishedSample] = []
        while generator.has_work():
            done += generator.step()
        seconds = time.perf_counter() - start
        stats = generator.stats()
        tried_at, accepted_at = _depths(done)
        return Timing(
            seconds=seconds,
            start_seconds=start - began,
            tokens=stats.generated_tokens,
            drafted=stats.drafted,
            accepted=stats.accepted,
            tried_at=tried_at,
            accepted_at=accepted_at,
            verifications=stats.verifications,
            outside_forward=1 - stats.forward_seconds / seconds,
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
        if job.drafter not in ("none", "prompt-lookup"):
            raise UsageError(f"transformers has no drafter {job.drafter!r}; it has none, prompt-lookup")
        torch = self._torch
        torch.manual_seed(job.seed)
        rows = [prompt for prompt in job.prompts for _ in range(job.group_size)]
        options: dict[str, Any] = {"do_sample": job.temperature > 0}
        if job.temperature > 0:
            options |= {"temperature": job.temperature, "top_k": 0, "top_p": 1.0}
        if job.drafter == "prompt-lookup":
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


class VLLM:
    """vLLM's offline engine with its own drafters; its sampler is corrected where it needs that (`engine.vllm`)."""

    drafters: ClassVar[dict[str, dict[str, Any] | None]] = {
        "none": None,
        "ngram": {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4},
        "suffix": {"method": "suffix"},
    }

    def __init__(self, model: Path) -> None:
        self._model = model
        self._engines: dict[tuple[str, int], Any] = {}

    def run(self, job: Job) -> Timing:
        from vllm import SamplingParams

        from pipeline.engine.vllm.proposer import KEY

        engine = self._engine(job)
        sampling = [
            SamplingParams(
                n=job.group_size, temperature=job.temperature, min_tokens=job.tokens, max_tokens=job.tokens,
                ignore_eos=True, detokenize=False, seed=job.seed + i, extra_args={KEY: [i, job.seed]},
            )
            for i in range(len(job.prompts))
        ]  # fmt: skip
        start = time.perf_counter()
        made = engine.generate([{"prompt_token_ids": prompt} for prompt in job.prompts], sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        outputs = [output for request in made for output in request.outputs]
        tokens = sum(len(output.token_ids) for output in outputs)
        metrics = [output.spec_decode_metrics for output in outputs if output.spec_decode_metrics is not None]
        accepted = sum(n * count for found in metrics for n, count in enumerate(found.histogram))
        return Timing(
            seconds=seconds,
            tokens=tokens,
            drafted=sum(found.num_draft_tokens for found in metrics),
            accepted=accepted,
            verifications=tokens - accepted,
            resident_bytes=resident_bytes(peak=True),
        )

    def _speculation(self, job: Job) -> dict[str, Any]:
        """Arguments of the engine."""
        if job.drafter not in self.drafters:
            raise UsageError(f"vllm has no drafter {job.drafter!r} here; it has {', '.join(self.drafters)}")
        own = self.drafters[job.drafter]
        return {"speculative_config": own and {**own, "num_speculative_tokens": job.max_draft_tokens}}

    def _engine(self, job: Job) -> Any:
        """One for each drafter, compiled; those of another batch size are ended, as they hold memory."""
        key = (job.drafter, job.batch)
        for other in [other for other in self._engines if other[1] != job.batch]:
            self._engines.pop(other).llm_engine.engine_core.shutdown()
        if key not in self._engines:
            from vllm import LLM

            from pipeline.engine.vllm.arguments import WORKER

            arguments = self._speculation(job)
            if arguments["speculative_config"]:
                arguments["per_request_spec_decode_metrics"] = "summary"
            engine = LLM(
                str(self._model), max_num_seqs=job.batch, enable_prefix_caching=True, max_model_len=1024,
                disable_log_stats=True, worker_extension_cls=WORKER, kv_cache_memory_bytes=VLLM_KV_BYTES, **arguments,
            )  # fmt: skip
            engine.collective_rpc("rollahead_bind")
            self._engines[key] = engine
        return self._engines[key]


class RollaheadVLLM(VLLM):
    """vLLM's engine with a drafter of ours in it."""

    def _speculation(self, job: Job) -> dict[str, Any]:
        from pipeline.engine.vllm.arguments import speculation

        return speculation({"name": job.drafter}, {}, job.max_draft_tokens)


SYSTEMS: dict[str, type[Rollahead] | type[Transformers] | type[VLLM]] = {
    "rollahead-vllm": RollaheadVLLM,
    "rollahead": Rollahead,
    "transformers": Transformers,
    "vllm": VLLM,
}


def serve(system: str, model: Path, threads: int) -> None:
    """Answers jobs until standard input ends."""
    import torch

    torch.set_num_threads(threads)
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries that print must not spoil the answers
    runner: System = SYSTEMS[system](model)
    for line in sys.stdin:
        timing = runner.run(msgspec.json.decode(line, type=Job))
        answers.write(msgspec.json.encode(timing).decode() + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
