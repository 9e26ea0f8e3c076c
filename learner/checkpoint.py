"""Checkpoints: everything a run needs to go on bit for bit, one folder a step, written atomically.

`root/step-N` is a complete Hugging Face model folder (model.safetensors in float32, config.json, tokenizer) beside
optimizer.safetensors, rng.safetensors, state.json and manifest.json, which lists the size and checksum of every other
file. A folder of that name exists only once all of it is on disk. Several ranks write shards in place of the two files
of tensors (`learner.checkpoint_tensors`); any number of ranks can go on from either.
"""

import logging
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from learner import checkpoint_tensors, ranks
from learner.policy import copy_companion_files
from pipeline.durable import sync
from pipeline.errors import RunFailed
from pipeline.failpoints import failpoint
from pipeline.weights.filesystem import save_tensors

MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step-(\d+)")
_DAMAGED_FOLDER = re.compile(r"step-(\d+)\.corrupt")

_log = logging.getLogger(__name__)


class FileRecord(msgspec.Struct):
    """A line of the manifest."""

    bytes: int
    crc32: int


class CorruptCheckpoint(RunFailed):
    """A checkpoint's files are not what its manifest says."""


_Manifest = dict[str, FileRecord]


@dataclass(frozen=True, slots=True)
class Restored:
    """What `restore` found beside weights, optimiser state and random generators, which it has put back."""

    folder: Path
    step: int
    state: Any
    """as given to `save`: of the type asked for, or plain JSON values"""


def save(
    root: Path,
    step: int,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    state: Any,
    *,
    keep: int = 2,
    tokenizer_folder: Path | str | None = None,
) -> Path:
    """Write `root/step-N` and delete all but the newest `keep` checkpoints. All ranks call it; what is not a tensor is
    rank 0's.

    Args:
        root: the run's folder of checkpoints, owned by this process alone.
        step: batches trained.
        state: a msgspec Struct or JSON-able value, stored in the same atomic step.
        keep: checkpoints to keep, at least 1.
        tokenizer_folder: where the tokenizer's files are copied from; default: where the model was loaded from.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: disk full or not writable; the checkpoints before are untouched.
    """
    temporary = root / f".tmp-step-{step}"
    try:
        ranks.together(lambda: _begin(root, temporary) if ranks.rank() == 0 else None)
        failpoint("checkpoint.begun")
        ranks.together(lambda: checkpoint_tensors.write(temporary, model, optimizer))
        shares = ranks.messages(msgspec.json.encode(ranks.together(lambda: _recorded(temporary))))
        records = {k: v for share in shares for k, v in msgspec.json.decode(share, type=_Manifest).items()}
        if ranks.rank() == 0:
            _write_rest(temporary, model, state, tokenizer_folder, records)
            failpoint("checkpoint.written")
    except OSError:
        if ranks.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    final = root / f"step-{step}"
    if ranks.rank() == 0:
        _acknowledge(root, temporary, final)
        _prune(root, keep)
        failpoint("checkpoint.done")
    return final


def _begin(root: Path, temporary: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".tmp-*"):
        shutil.rmtree(leftover)
    temporary.mkdir()


def _acknowledge(root: Path, temporary: Path, final: Path) -> None:
    if final.exists():
        final.rename(root / f".tmp-replaced-{final.name}")
    temporary.rename(final)
    sync(root)
    failpoint("checkpoint.renamed")


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint: its manifest is there and every file has its size. None if there is none."""
    return next((folder for _, folder in _newest_first(root) if _is_complete(folder)), None)


def restore(
    root: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    state_type: Any = Any,
    warn: Callable[[str], None] = _log.warning,
    before: int | None = None,
) -> Restored | None:
    """Put back the newest intact checkpoint: weights, optimiser state, torch's random generators.

    Args:
        before: only checkpoints of an earlier step than this count.

    A damaged checkpoint is renamed to `step-N.corrupt`, reported through `warn`, and the one before it is tried.

    Returns:
        Its step and state, or None if there has never been a checkpoint.

    Raises:
        RunFailed: there are checkpoints, damaged ones of earlier starts included, and none is intact; or it is of
            another model.
    """
    chosen = _newest_intact(root, state_type, warn, before) if ranks.rank() == 0 else None
    if ranks.rank() == 0:
        ranks.tell(lambda: str(chosen or "").encode())
    else:
        chosen = Path(heard) if (heard := ranks.hear().decode()) else None
    if chosen is None:
        return None
    checkpoint_tensors.read(chosen, model, optimizer)
    _restore_generators(load_file(chosen / checkpoint_tensors.GENERATORS))
    return Restored(chosen, int(chosen.name.removeprefix("step-")), _state(chosen, state_type))


def _newest_intact(root: Path, state_type: Any, warn: Callable[[str], None], before: int | None) -> Path | None:
    """The folder that `restore` goes on from."""
    for folder in _earlier(root, _STEP_FOLDER, before):
        try:
            verify(folder)
            _state(folder, state_type)
            checkpoint_tensors.sizes(folder)
        except (CorruptCheckpoint, SafetensorError) as error:
            damaged = folder.with_name(folder.name + ".corrupt")
            shutil.rmtree(damaged, ignore_errors=True)  # of an earlier damage at the same step
            folder.rename(damaged)
            warn(f"checkpoint {folder} is damaged ({error}); moved to {damaged.name}, trying the one before")
            continue
        return folder
    if _earlier(root, _DAMAGED_FOLDER, before):
        raise RunFailed(f"no checkpoint in {root} is intact; restore one from a backup, or start a new run elsewhere")
    return None


def _earlier(root: Path, name: re.Pattern[str], before: int | None) -> list[Path]:
    """Folders of that name, of steps before one if it is given, the newest first."""
    return [folder for step, folder in _newest_first(root, name) if before is None or step < before]


def _state(folder: Path, state_type: Any) -> Any:
    try:
        return msgspec.json.decode((folder / "state.json").read_bytes(), type=state_type)
    except msgspec.ValidationError as error:
        raise RunFailed(f"{folder / 'state.json'} was written by another version of rollahead: {error}") from error


def _recorded(folder: Path) -> dict[str, FileRecord]:
    """This rank's files of tensors, pushed to the disk."""
    files = checkpoint_tensors.own_files(folder)
    for path in files:
        sync(path)
    return {path.name: FileRecord(path.stat().st_size, _crc32(path)) for path in files}


def _write_rest(
    folder: Path,
    model: PreTrainedModel,
    state: Any,
    tokenizer_folder: Path | str | None,
    records: dict[str, FileRecord],
) -> None:
    """All but the tensors, and the manifest of all."""
    save_tensors(_generators(), folder / checkpoint_tensors.GENERATORS)
    model.config.save_pretrained(folder)
    source = tokenizer_folder or model.config.name_or_path
    if source:
        copy_companion_files(source, folder)
    (folder / "state.json").write_bytes(msgspec.json.encode(state))
    others = [path for path in sorted(folder.iterdir()) if path.name not in records]
    manifest = records | {path.name: FileRecord(path.stat().st_size, _crc32(path)) for path in others}
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    for path in [*others, folder / MANIFEST]:
        sync(path)
    sync(folder)


def _generators() -> dict[str, torch.Tensor]:
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return generators


def _restore_generators(generators: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(generators["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda:{index}" in generators:
            torch.cuda.set_rng_state(generators[f"cuda:{index}"], index)


def _newest_first(root: Path, name: re.Pattern[str] = _STEP_FOLDER) -> list[tuple[int, Path]]:
    matches = ((name.fullmatch(path.name), path) for path in root.glob("step-*"))
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _manifest(folder: Path) -> dict[str, FileRecord]:
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=dict[str, FileRecord])
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"{MANIFEST} is missing") from error
    except msgspec.MsgspecError as error:
        raise CorruptCheckpoint(f"{MANIFEST}: {error}") from error


def _is_complete(folder: Path) -> bool:
    try:
        return all(
            (folder / name).is_file() and (folder / name).stat().st_size == record.bytes
            for name, record in _manifest(folder).items()
        )
    except CorruptCheckpoint:
        return False


def verify(folder: Path) -> None:
    """Raises CorruptCheckpoint: a file is missing, or is not what the manifest says."""
    for name, record in _manifest(folder).items():
        path = folder / name
        if not path.is_file():
            raise CorruptCheckpoint(f"{name} is missing")
        if path.stat().st_size != record.bytes:
            raise CorruptCheckpoint(f"{name} has {path.stat().st_size} bytes instead of {record.bytes}")
        if _crc32(path) != record.crc32:
            raise CorruptCheckpoint(f"{name} does not have its checksum")


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _prune(root: Path, keep: int) -> None:
    """Delete old checkpoints; renamed first, so that a half-deleted one is never taken for a checkpoint."""
    for _, folder in _newest_first(root)[max(1, keep) :]:
        folder.rename(root / f".tmp-pruned-{folder.name}")
    for leftover in root.glob(".tmp-*"):
        shutil.rmtree(leftover)
