"""The vLLM generator of a run's configuration."""

import os
from collections.abc import Callable
from pathlib import Path

from pipeline.config import Config, resolve_threads
from pipeline.engine.vllm.generator import VllmGenerator


def vllm_generator(config: Config, folder: Path, on_event: Callable[[str], None]) -> VllmGenerator:
    """On the model in `folder`; raises as `VllmGenerator` does."""
    engine, sampling = config.engine, config.sampling
    # On a CPU vLLM would bind its workers to all cores, which engine and learner share.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", str(resolve_threads(engine.threads, config)))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    return VllmGenerator(
        folder,
        drafter=engine.drafter,
        drafter_seconds=engine.drafter_seconds,
        options=engine.vllm,
        max_sequences=engine.max_sequences,
        max_draft_tokens=engine.max_draft_tokens,
        max_length=sampling.max_prompt_tokens + sampling.max_new_tokens,
        dtype=engine.dtype,
        kv_bytes=engine.kv_bytes,
        recompute_on_update=engine.update_kv == "recompute",
        on_event=on_event,
    )
