"""What a learner needs beside a configuration that makes sense: seen before anything is loaded, also by --dry-run."""

from pathlib import Path

from drafters.mtp.fitting import trainable_head
from learner.policy import resolve_device
from pipeline.config import Config, check_against_model
from pipeline.config.types import TaskSection
from pipeline.errors import UsageError
from pipeline.models.chat import chat_template
from pipeline.models.config import ModelConfig
from pipeline.models.tokenizer import Tokenizer
from pipeline.tasks import Task, load_task
from pipeline.transport.keys import load_learner_keys
from pipeline.transport.options import check_address, check_listening
from pipeline.weights.group import check_broadcasting


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
    if config.weights.transfer == "collective":
        check_broadcasting(config.weights.address, transport.insecure)
    resolve_device(learner.device)
    if learner.reference_path and not (Path(learner.reference_path) / "config.json").is_file():
        raise UsageError(
            f"learner.reference_path {learner.reference_path!r} is no Hugging Face checkpoint: it has no config.json"
        )
    _check_draft_head(config)
    if not evaluate_only:
        _check_apart(config.task)
    if evaluate_only or learner.eval_every:
        _check_held_out(config, "--eval-only" if evaluate_only else f"learner.eval_every = {learner.eval_every}")


def check_inputs(config: Config) -> None:
    """Look at the model's configuration and tokenizer, and at the task, as far as they are on this machine; no weights.

    Raises:
        UsageError: a sentence that names file or option and what to do.
    """
    folder = config.model.path
    if folder:
        Tokenizer(folder)
        check_against_model(config, ModelConfig.from_folder(folder).max_positions)
    if config.task.kind != "datasets" or Path(config.task.path).exists():  # a name on the hub would be downloaded
        load_task(config.task, config.run.seed, chat_template(folder) if folder else None)


def _check_draft_head(config: Config) -> None:
    """The head that co-training begins with is there, and fits the policy as far as that is known."""
    start, folder = config.drafter.start, config.model.path
    if config.drafter.co_train and (start or folder):
        trainable_head(start, Path(folder), ModelConfig.from_folder(folder) if folder else None)


def _check_held_out(config: Config, why: str) -> None:
    path = config.task.held_out_path
    if config.task.kind == "jsonl" and not path:
        raise UsageError(f"{why} needs task.held_out_path, a file of held-out prompts like task.path")
    if config.task.kind == "jsonl" and not Path(path).is_file():
        raise UsageError(f"task.held_out_path {path!r} is not a file, which {why} needs")


def _check_apart(task: TaskSection) -> None:
    """Refuse training samples as held-out ones."""
    path, held_out = Path(task.path), Path(task.held_out_path)
    if task.kind == "jsonl" and task.held_out_path and path.exists() and held_out.exists() and held_out.samefile(path):
        raise UsageError(
            f"task.held_out_path {task.held_out_path!r} is task.path, which is trained on; give a file of other prompts"
        )
    if task.kind != "datasets" or not task.held_out_split:
        return
    if task.held_out_split == task.split:
        raise UsageError(
            f"task.held_out_split {task.held_out_split!r} is task.split, which is trained on; give another split"
        )
    if (path / "state.json").exists():
        raise UsageError(
            f"task.held_out_split {task.held_out_split!r}: {task.path} is one dataset without splits, all of it "
            "trained on; save a DatasetDict, or leave task.held_out_split empty"
        )


def shared_prompts(config: Config, task: Task) -> str | None:
    """A sentence for the log where files have held-out prompts that are trained on."""
    if config.task.kind != "jsonl" or not task.held_out:
        return None
    trained = {example.prompt for example in task.train}
    shared = sum(example.prompt in trained for example in task.held_out)
    if not shared:
        return None
    return (
        f"WARNING: {shared} of {len(task.held_out)} prompts of task.held_out_path {config.task.held_out_path} are in "
        "task.path too and are trained on; leave them out of one of the two"
    )
