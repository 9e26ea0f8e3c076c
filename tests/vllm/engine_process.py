"""A program: an engine on vLLM that says when it is ready, and is then told nothing more. Argument: a model."""

import sys
import time
from pathlib import Path

from pipeline.engine.vllm.generator import VllmGenerator  # at the top: vLLM's processes run it, too, as numba's import

if __name__ == "__main__":
    generator = VllmGenerator(
        Path(sys.argv[1]), drafter={"name": "none"}, max_sequences=2, max_length=32, stop_token_ids=(),
        options={"enforce_eager": True},
    )  # fmt: skip
    print("ready", flush=True)
    time.sleep(600)
