"""What engine and learner must agree on, as short hashes by name, compared at HELLO. Torch-free."""

import hashlib
from pathlib import Path

import msgspec

from pipeline.config import Config
from pipeline.errors import UsageError


def run_digest(config: Config) -> dict[str, str]:
    """Hashes of model, tokenizer, task and sampling.

    Raises:
        UsageError: the model folder lacks config.json or tokenizer.json.
    """
    task = config.task
    digest = {
        "sampling": _hash(msgspec.json.encode(config.sampling)),
        "task": _hash(
            msgspec.json.encode([task.kind, task.prompt_template, task.answer_field, task.reward, *task.reward_weights])
        ),
    }
    if config.model.path:
        folder = Path(config.model.path)
        digest["model"] = _hash(_read(folder, "config.json"))
        digest["tokenizer"] = _hash(_read(folder, "tokenizer.json"))
    else:
        digest["model"] = _hash(msgspec.json.encode([config.model, task.digits, task.operands, config.run.seed]))
        digest["tokenizer"] = "embedded"
    return digest


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise UsageError(
            f"model.path = {str(folder)!r}: {name} cannot be read ({error.strerror}); "
            "give a Hugging Face checkpoint directory"
        ) from error
