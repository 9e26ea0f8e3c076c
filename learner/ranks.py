"""The one place that knows several ranks: processes that `torchrun` started and that train one policy together.

Rank 0 leads. It owns sockets, journal and ledger, and tells the others over a side channel what comes next: a batch, a
publication, a checkpoint, or that there is nothing yet, so that no collective operation waits for data. Every rank has
the whole batch; what is divided are the passes through the model, and what these say of each token is exchanged. The
pieces of an objective therefore see a batch as one rank would, and know nothing of ranks.

Weights, gradients and optimiser state are sharded by FSDP2 (`torch.distributed.fsdp.fully_shard`), layer by layer.
"""

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import MethodType
from typing import Any, TypeVar

import msgspec
import torch
from torch import distributed
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.errors import RunFailed

_FOR_EVER = timedelta(days=365)

_side_channel: "distributed.ProcessGroup | None" = None
"""On the CPU, whatever the model is on: the others wait in it for rank 0 without a GPU that spins."""

T = TypeVar("T")


def launched() -> bool:
    """Whether torchrun started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start(device: str, patience: float) -> None:
    """Join the other ranks; nothing to do for a process that is alone.

    Args:
        device: type of the model's, "cpu" or "cuda".
        patience: seconds that a rank may be behind the others; 0: any.
    """
    global _side_channel
    if not launched() or distributed.is_initialized():
        return
    timeout = timedelta(seconds=patience) if patience else _FOR_EVER
    if device == "cuda":
        torch.cuda.set_device(local_rank())
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timeout)
    _side_channel = distributed.new_group(backend="gloo", timeout=timeout)


def stop() -> None:
    """Leave the other ranks."""
    global _side_channel
    if distributed.is_initialized():
        distributed.destroy_process_group()
        _side_channel = None


def world_size() -> int:
    """Ranks that share a batch."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Number of this rank; 0 leads."""
    return distributed.get_rank() if world_size() > 1 else 0


def local_rank() -> int:
    """Number of this rank among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def on_this_machine() -> int:
    """Ranks that share this machine's cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_loss_of_a_rank(error: BaseException) -> bool:
    """Whether a collective operation failed, which it does where another rank is gone or hangs."""
    if world_size() == 1:
        return False
    # gloo has no exception of its own; its messages begin with the place in its source
    from_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return from_gloo or isinstance(error, distributed.DistError)


def lost() -> RunFailed:
    """What a run ends with when another rank is gone."""
    return RunFailed(
        f"rank {rank()} of {world_size()} lost another rank of the learner, or waited too long for it "
        "(transport.stall_seconds); see that rank's output; the same command goes on from the newest checkpoint"
    )


# ---- what rank 0 tells the others ------------------------------------------------------------------------------------


def tell(content: Callable[[], bytes]) -> None:
    """Rank 0's message to all others, which `hear` it; made only where somebody listens."""
    if world_size() > 1:
        _broadcast(content())


def hear() -> bytes:
    """The next message of rank 0."""
    return _broadcast(None)


def _broadcast(content: bytes | None) -> bytes:
    length = torch.tensor([len(content) if content is not None else 0])
    distributed.broadcast(length, src=0, group=_side_channel)
    body = torch.empty(int(length), dtype=torch.uint8)
    if content:
        body = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if len(body):
        distributed.broadcast(body, src=0, group=_side_channel)
    return body.numpy().tobytes() if content is None else content


def messages(own: bytes) -> list[bytes]:
    """What each rank says, on all of them."""
    if world_size() == 1:
        return [own]
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    distributed.all_gather(lengths, torch.tensor([len(own)]), group=_side_channel)
    longest = max(1, *(int(length) for length in lengths))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(own)] = torch.frombuffer(bytearray(own or b"\0"), dtype=torch.uint8)[: len(own)]
    parts = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(parts, padded, group=_side_channel)
    return [part[: int(length)].numpy().tobytes() for part, length in zip(parts, lengths, strict=True)]


def together(action: Callable[[], T]) -> T:
    """Do something on every rank. All wait for one another, and a failure of any of them to write is one of all.

    Raises:
        OSError: this rank's, or one of the same number.
    """
    number, result, failure = 0, None, None
    try:
        result = action()
    except OSError as error:
        number, failure = error.errno or errno.EIO, error
    failed = max(int(said) for said in messages(str(number).encode()))
    if failed:
        raise failure or OSError(failed, os.strerror(failed))
    return result  # type: ignore[return-value]


# ---- what is divided, and what is put together -----------------------------------------------------------------------


def own(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of a sequence: as many items as every other's, rank after rank."""
    each = len(items) // world_size()
    return items[rank() * each : (rank() + 1) * each]


def exchanged(columns_KT: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """All ranks' columns of tokens, of `sizes` tokens, rank after rank, on each of them; [K, sum of sizes]."""
    if world_size() == 1:
        return columns_KT
    start = sum(sizes[: rank()])
    whole = columns_KT.new_zeros(len(columns_KT), sum(sizes))
    whole[:, start : start + sizes[rank()]] = columns_KT
    if whole.numel():
        distributed.all_reduce(whole)
    return whole


def summed_values(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over ranks, of which some may lack a key, on each of them."""
    total: dict[str, float] = {}
    for text in messages(msgspec.msgpack.encode(dict(values))):
        for key, value in msgspec.msgpack.decode(text, type=dict[str, float]).items():
            total[key] = total.get(key, 0.0) + value
    return total


def gathered(values: torch.Tensor) -> torch.Tensor:
    """All ranks' rows [n_r, ...] one after another [sum n_r, ...], on each of them; the number of rows may differ."""
    if world_size() == 1:
        return values
    count = torch.tensor([len(values)], device=values.device)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    distributed.all_gather(counts, count)
    longest = int(torch.cat(counts).max())
    padded = values.new_zeros(longest, *values.shape[1:])
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


# ---- a model that is sharded -----------------------------------------------------------------------------------------


def shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Give each rank its share of every parameter; alone, the model only moves to the device.

    A layer's weights are gathered for its forward and its backward pass, embedding and head for the whole pass.
    Gradients are summed over ranks, not averaged: a loss is a sum whose terms know the count of all ranks.
    """
    if world_size() == 1:
        return model.to(device)  # type: ignore[arg-type]
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world_size(),))
    for layer in [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    # Log-probs are not made by the model's forward, which would form all logits.
    model.with_weights = MethodType(_call, model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "with_weights")
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return model


def _call(model: PreTrainedModel, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(model, *arguments)


def with_weights(model: PreTrainedModel, function: Callable[..., T], *arguments: Any) -> T:
    """function(model, *arguments), with the weights of a sharded model gathered for it and for its backward pass."""
    call: Callable[..., T] = getattr(model, "with_weights", None) or MethodType(_call, model)
    return call(function, *arguments)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded. All ranks call it, and each then holds that one tensor."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def side_channel() -> "distributed.ProcessGroup | None":
    return _side_channel
