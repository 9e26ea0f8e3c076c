"""What a learner needs beside a configuration that makes sense: seen before anything is loaded, also by --dry-run."""

from pathlib import Path

from learner.policy import resolve_device
from pipeline.config import Config
from pipeline.errors import UsageError
from pipeline.transport.keys import load_learner_keys
from pipeline.transport.options import check_address, check_listening


def check_startup(config: Config, evaluate_only: bool = False) -> None:
    """Look at addresses, keys, device and files.

    Raises:
        UsageError: a sentence that names the option and what to do.
    """
    transport, learner = config.transport, config.learner
    check_address(transport.address, "transport.address")
    check_listening(transport.address, bool(transport.keys), transport.insecure, lambda line: None)
    if transport.keys:
        load_learner_keys(Path(transport.keys))
    resolve_device(learner.device)
    if learner.reference_path and not (Path(learner.reference_path) / "config.json").is_file():
        raise UsageError(
            f"learner.reference_path {learner.reference_path!r} is no Hugging Face checkpoint: it has no config.json"
        )
    if evaluate_only or learner.eval_every:
        _check_held_out(config, "--eval-only" if evaluate_only else f"learner.eval_every = {learner.eval_every}")


def _check_held_out(config: Config, why: str) -> None:
    path = config.task.held_out_path
    if config.task.kind == "jsonl" and not path:
        raise UsageError(f"{why} needs task.held_out_path, a file of held-out prompts like task.path")
    if config.task.kind == "jsonl" and not Path(path).is_file():
        raise UsageError(f"task.held_out_path {path!r} is not a file, which {why} needs")
