"""A checkpoint of a run as a plain Hugging Face folder, without what only training needs, and the draft head that was
trained beside it, where there is one."""

import shutil
from pathlib import Path

import torch

from drafters.mtp.head import FILE, PREFIX
from learner import checkpoint_tensors
from learner.checkpoint import CorruptCheckpoint, verify
from pipeline.errors import RunFailed, UsageError
from pipeline.models.checkpoint import read_tensors
from pipeline.run_directory import RunDirectory
from pipeline.weights.filesystem import save_tensors, state_dtype

_TRAINING_ONLY = {checkpoint_tensors.GENERATORS, "state.json", "manifest.json"}


def export(folder: Path, step: int | None, out: Path, dtype: str = "float32") -> Path:
    """Write `out` and return the checkpoint it is made from. A head that was trained beside the policy comes along, as
    a file that the drafter mtp finds in a model's folder.

    Args:
        folder: run directory.
        step: of the checkpoint; None: the newest.
        out: must not exist.
        dtype: of the weights, a torch type's name.

    Raises:
        UsageError: no such checkpoint, or `out` exists, or the head's file is damaged.
        RunFailed: the checkpoint is damaged.
    """
    run = RunDirectory(folder)
    root = run.checkpoints
    steps = sorted(int(path.name.removeprefix("step-")) for path in root.glob("step-*") if path.name[5:].isdigit())
    if not steps:
        raise UsageError(f"{folder} has no checkpoint; give a run directory")
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        raise UsageError(f"{folder} has no checkpoint of step {chosen}; there are {', '.join(map(str, steps))}")
    if out.exists():
        raise UsageError(f"--out {out} exists already; choose a new folder")
    source = root / f"step-{chosen}"
    try:
        verify(source)
    except CorruptCheckpoint as error:
        raise RunFailed(f"the checkpoint {source} is damaged ({error}); export another step") from error
    temporary = out.with_name(f".{out.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(source, temporary, dtype)
        _write_head(run.draft_head / source.name, temporary, dtype)
        temporary.rename(out)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UsageError(f"--out {out} cannot be written ({error.strerror or error}); free space there") from error
    except UsageError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return source


def _write(source: Path, target: Path, dtype: str) -> None:
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.name not in _TRAINING_ONLY and not checkpoint_tensors.is_tensor_file(path.name):
            shutil.copyfile(path, target / path.name)
    state_dtype(target, dtype)
    kind, sizes = getattr(torch, dtype), checkpoint_tensors.sizes(source)
    weights = {name: torch.empty(sizes[name], dtype=kind) for name in sizes if checkpoint_tensors.is_weight(name)}
    checkpoint_tensors.load(source, weights)
    save_tensors(weights, target / checkpoint_tensors.WEIGHTS)


def _write_head(source: Path, target: Path, dtype: str) -> None:
    head = source / FILE
    if head.exists():
        tensors = read_tensors([head], PREFIX)
        save_tensors({name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}, target / FILE)
