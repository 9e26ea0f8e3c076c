"""What vLLM takes from environment variables, and by which its processes know who started them."""

import multiprocessing
import os

from pipeline.errors import UsageError
from pipeline.parent import end_with_parent

STARTER = "ROLLAHEAD_VLLM_STARTER"
"""process whose children end with it"""
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


def prepare(drafting: bool) -> None:
    """Before vLLM's processes are started; what the user has set stays.

    Raises:
        UsageError: a model runner that cannot be driven with drafts.
    """
    # The second model runner verifies with a sampler of its own, which is not the one that is tested at the start.
    os.environ.setdefault(RUNNER, "0")
    if drafting and os.environ[RUNNER] != "0":
        raise UsageError(
            f'{RUNNER}={os.environ[RUNNER]} asks for a model runner that is not driven with drafts; unset it, or set '
            'engine.drafter = "none"'
        )  # fmt: skip
    # Forked, they would take over locks that other threads hold, and would not run our plugin, which ties them to us.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ[STARTER] = str(os.getpid())


def end_with_starter() -> None:
    """In a process of vLLM's: end with the engine's process, or with the engine core that this is a worker of.

    Both start their children in a thread that stays: the client's, and the main one.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None and os.environ.get(STARTER) == str(parent.pid):
        os.environ[STARTER] = str(os.getpid())
        end_with_parent(parent.pid)
