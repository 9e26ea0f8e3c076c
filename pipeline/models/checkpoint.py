"""Weights from safetensors, single file or sharded, into a decoder."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import UsageError
from pipeline.models.config import ModelConfig
from pipeline.models.decoder import Decoder
from pipeline.models.precision import choose

MTP_LAYERS = "model.mtp_layers."
"""where MiMo's checkpoints keep their multi-token-prediction layers, which `drafters.mtp` reads"""
SMALL_MODEL = "small_model."
"""Before the names of a publication's tensors that are of the small model beside the policy."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SAMPLED = 1024
"""values of each tensor, about, that a digest is made of"""


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def load_decoder(folder: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "auto") -> Decoder:
    """The decoder of a Hugging Face checkpoint directory.

    Raises:
        UsageError: folder, file or tensor missing, truncated or of the wrong shape; the text names it.
    """
    config = ModelConfig.from_folder(folder)
    on = compute_device(device)
    decoder = Decoder(config, compute_dtype(dtype, config, on), on)
    load_weights_into(decoder, folder)
    return decoder


def compute_dtype(dtype: torch.dtype | str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto` is chosen by `pipeline.models.precision`."""
    if isinstance(dtype, torch.dtype):
        return dtype
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype == "auto" and config.dtype in (*kinds, "float16"):
        return choose(config, device).dtype
    name = config.dtype if dtype == "auto" else dtype
    if name not in kinds:
        raise UsageError(f"dtype {name!r} is not supported; use float32 or bfloat16")
    return kinds[name]


def compute_device(device: torch.device | str, option: str = "device") -> torch.device:
    """`auto` is CUDA where there is a device, else the CPU.

    Raises:
        UsageError: no such device here; `option` is what names it.
    """
    if isinstance(device, torch.device):
        return device
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"{option} {name!r} is not available on this machine; use cpu or auto")
    try:
        found = torch.device(name)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"{option} {name!r} is unknown; use auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"{option} {name!r}: this machine shows {torch.cuda.device_count()} CUDA devices")
    return found


def load_weights_into(decoder: Decoder, folder: str | Path) -> None:
    """Overwrites every weight of `decoder` from a folder's safetensors, cast to its compute type.

    All names and shapes are checked before the first weight changes, so a bad folder leaves the decoder as it was.

    Raises:
        UsageError: as for `load_decoder`.
    """
    load_tensors(decoder, _shard_paths(Path(folder)), "model.", beside=MTP_LAYERS)
    decoder.source, decoder.beside = Path(folder), {}


class _Prefixed:
    """A decoder whose tensors have longer names in the file."""

    def __init__(self, decoder: Decoder, prefix: str) -> None:
        self._decoder, self._prefix = decoder, prefix

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {self._prefix + name: shape for name, shape in self._decoder.shapes.items()}

    def load(self, tensor: Callable[[str], Tensor]) -> None:
        self._decoder.load(lambda name: tensor(self._prefix + name))


def load_small_model_into(decoder: Decoder, folder: str | Path) -> bool:
    """Overwrites a small model's weights with those published beside the policy; False where there are none.

    Raises:
        UsageError: as for `load_decoder`.
    """
    files = files_with(Path(folder), SMALL_MODEL)
    if files:
        load_tensors(_Prefixed(decoder, SMALL_MODEL), files, SMALL_MODEL)
    return bool(files)


class Loads(Protocol):
    """What has named tensors."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def load(self, tensor: Callable[[str], Tensor]) -> None: ...


@torch.no_grad()
def load_tensors(model: Loads, files: Sequence[Path], prefix: str, beside: str | None = None) -> None:
    """Overwrites every weight of `model` from safetensors files, where no other tensor's name may begin with `prefix`,
    unless it begins with `beside`.

    Raises:
        UsageError: a file or tensor is missing, truncated, too much, or of the wrong shape; nothing has changed then.
    """
    with _open(files) as shards:
        sources = {name: (file, path) for path, file in shards for name in file.keys()}  # noqa: SIM118
        found = {name: tuple(file.get_slice(name).get_shape()) for name, (file, _) in sources.items()}
        check_shapes(model.shapes, found, prefix, beside, lambda name: sources[name][1] if name else files[0].parent)
        model.load(lambda name: sources[name][0].get_tensor(name))


def check_shapes(
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    prefix: str,
    beside: str | None,
    place: Callable[[str], object],
) -> None:
    """
    Args:
        wanted: shape of every tensor that a model needs.
        found: of every tensor that there is.
        prefix: of names that only the model's tensors have, unless they begin with `beside`.
        beside: None: all are the model's.
        place: where a tensor is, for people; of an empty name, where all are.

    Raises:
        UsageError: a tensor is missing, too much, or of the wrong shape.
    """
    for name, shape in wanted.items():
        if name not in found:
            raise UsageError(f"{place('')} has no tensor {name}; is it the checkpoint of this model?")
        if found[name] != shape:
            raise UsageError(f"{place(name)}: tensor {name} has shape {found[name]} where the model needs {shape}")
    for name in found:
        # A bias or layer the configuration does not announce would silently change what the model computes.
        known = name in wanted or name.endswith("rotary_emb.inv_freq") or (beside and name.startswith(beside))
        if name.startswith(prefix) and not known:
            raise UsageError(f"{place(name)}: tensor {name} has no place in the model that config.json describes")


def holds(files: Sequence[Path], prefix: str) -> bool:
    """Whether a tensor's name in safetensors files begins with `prefix`.

    Raises:
        UsageError: a file is missing or truncated.
    """
    with _open(files) as shards:
        return any(name.startswith(prefix) for _, file in shards for name in file.keys())  # noqa: SIM118


def read_tensors(files: Sequence[Path], prefix: str) -> dict[str, torch.Tensor]:
    """Those of safetensors files whose names begin with `prefix`.

    Raises:
        UsageError: a file is missing or truncated.
    """
    with _open(files) as shards:
        return {
            name: file.get_tensor(name)
            for _, file in shards
            for name in file.keys()  # noqa: SIM118
            if name.startswith(prefix)
        }


def files_with(folder: Path, prefix: str) -> list[Path]:
    """The safetensors files of a checkpoint directory, if a tensor's name in them begins with `prefix`; else none.

    Raises:
        UsageError: a file is missing or truncated.
    """
    paths = _shard_paths(folder)
    return paths if holds(paths, prefix) else []


def weights_digest(folder: Path) -> str:
    """What tells the weights of checkpoint directories apart: a hash of names, types, shapes and values of all tensors,
    of a large one not of all values.

    Raises:
        UsageError: a file is missing or truncated.
    """
    digest = hashlib.sha256()
    with _open(_shard_paths(folder)) as shards:
        files = {name: file for _, file in shards for name in file.keys()}  # noqa: SIM118
        for name in sorted(files):
            tensor = files[name].get_tensor(name)
            values = tensor.flatten()[:: max(1, tensor.numel() // _SAMPLED)].contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@contextmanager
def _open(files: Sequence[Path]) -> Iterator[list[tuple[Path, Any]]]:
    """Safetensors files, open; what each holds is mapped, not read."""
    with ExitStack() as stack:
        shards = []
        for path in files:
            try:
                shards.append((path, stack.enter_context(safe_open(path, framework="pt"))))
            except FileNotFoundError:
                raise UsageError(f"{path} is missing; the checkpoint is incomplete") from None
            except SafetensorError as error:
                raise UsageError(f"{path} is truncated or not safetensors ({error}); copy it again") from None
        yield shards


def _shard_paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UsageError(f"model folder {folder} does not exist; give a Hugging Face checkpoint directory")
    index = folder / INDEX
    if (folder / SINGLE).exists() or not index.exists():
        return [folder / SINGLE]
    try:
        shards = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except msgspec.MsgspecError as error:
        raise UsageError(f"{index} cannot be used: {error}") from None
    return [folder / name for name in sorted(set(shards.values()))]
