"""The tensors of a checkpoint: weights and AdamW's moments, in safetensors files.

A process alone writes model.safetensors and optimizer.safetensors, whole. Of several ranks each writes the shards that
it has (torch.distributed.checkpoint, in the safetensors format that it has for Hugging Face). Either is read by any
number of ranks, each taking what it needs.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from transformers import PreTrainedModel

from learner import ranks
from learner.policy import policy_state
from pipeline.errors import RunFailed
from pipeline.weights.filesystem import save_tensors

WEIGHTS = "model.safetensors"
MOMENTS = "optimizer.safetensors"
GENERATORS = "rng.safetensors"
_KINDS = ("exp_avg", "exp_avg_sq", "step")


def own_files(folder: Path) -> list[Path]:
    """Those that `write` made on this rank."""
    if ranks.world_size() == 1:
        return [folder / WEIGHTS, folder / MOMENTS]
    return sorted(folder.glob(f"shard-{ranks.rank() + 1:05d}-*.safetensors"))


def is_tensor_file(name: str) -> bool:
    """Whether a file of a checkpoint's folder holds weights or moments."""
    return name in (WEIGHTS, MOMENTS) or (name.startswith("shard-") and name.endswith(".safetensors"))


def write(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """All ranks call it.

    Raises:
        OSError: disk full or not writable, on this rank or another.
    """
    weights, moments = policy_state(model), _moments(model, optimizer)
    if ranks.world_size() == 1:
        save_tensors({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, folder / WEIGHTS)
        save_tensors({name: tensor.contiguous().cpu() for name, tensor in moments.items()}, folder / MOMENTS)
        return
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save({**weights, **moments}, storage_writer=writer, process_group=ranks.side_channel())
    except CheckpointException as error:
        failures = [failure[0] for failure in error.failures.values()]
        raise next((failure for failure in failures if isinstance(failure, OSError)), failures[0]) from error


def read(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and moments back in place. All ranks call it.

    Raises:
        RunFailed: they are of another model.
        SafetensorError: a file is damaged.
    """
    stored = sizes(folder)
    weights = policy_state(model)
    if {n: t.shape for n, t in weights.items()} != {n: s for n, s in stored.items() if is_weight(n)}:
        raise RunFailed(f"checkpoint {folder} is of another model than model.path; use the model the run began with")
    optimizer.state.clear()
    wanted = dict(weights)
    for name, parameter in model.named_parameters():
        if f"step/{name}" not in stored:
            continue
        # The step count stays where the fused optimiser keeps it: with the parameter.
        step = torch.zeros((), device=parameter.device)
        state = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter), "step": step}
        optimizer.state[parameter] = {kind: tensor.detach() for kind, tensor in state.items()}
        wanted |= {f"{kind}/{name}": tensor for kind, tensor in optimizer.state[parameter].items()}
    load(folder, wanted)


def load(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill these tensors, whole or sharded, from a checkpoint's files."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            dcp.load(
                tensors,
                storage_reader=_reader(folder),
                process_group=ranks.side_channel(),
                no_dist=ranks.world_size() == 1,
            )
        except CheckpointException as error:
            raise SafetensorError(str(next(iter(error.failures.values()))[0])) from error


def sizes(folder: Path) -> dict[str, torch.Size]:
    """Shape of every tensor of a checkpoint, by name."""
    metadata: dict[str, Any] = _reader(folder).read_metadata().state_dict_metadata
    return {name: stored.size for name, stored in metadata.items()}


def is_weight(name: str) -> bool:
    """Whether a tensor of that name is the policy's, not the optimiser's or a random generator's."""
    return "/" not in name and name != "cpu" and not name.startswith("cuda:")


def _reader(folder: Path) -> HuggingFaceStorageReader:
    return HuggingFaceStorageReader(str(folder))


def _moments(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state under "moment/parameter"; empty before the first step."""
    return {
        f"{kind}/{name}": optimizer.state[parameter][kind].detach()
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for kind in _KINDS
    }
