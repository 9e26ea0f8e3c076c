"""Whether a head fits a model, and can be trained: said from configuration and files, before weights are loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from drafters.mtp.head import head_files, head_tensors, is_mimos
from drafters.mtp.module import MTPModule
from pipeline.errors import UsageError
from pipeline.models.config import ModelConfig


def check_fits(files: Sequence[Path], config: ModelConfig) -> None:
    """
    Args:
        files: of a head.
        config: of the model it is to draft for.

    Raises:
        UsageError: a tensor is missing, or of another shape; the text names the first.
    """
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in MTPModule(config).weights().items()}
    found = {name: tuple(t.shape) for name, t in head_tensors(files).items()}
    if wrong := misfit(found, wanted):
        raise UsageError(
            f"the multi-token-prediction head in {files[0].parent} does not fit the model: {wrong}; train one for it "
            "(rollahead train-drafter)"
        )


def misfit(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """The first tensor, by name, whose shape is not the one wanted, in words; empty where there is none."""
    if found == wanted:
        return ""
    name = min(found.items() ^ wanted.items())[0]
    return f"{name} is {_shape(found.get(name))} where {_shape(wanted.get(name))} is needed"


def trainable_head(start: str, model: Path, config: ModelConfig | None) -> list[Path]:
    """Files of the head that training begins with; none: one is made of the model's last layer.

    Args:
        start: its folder; empty: the model's own, if it has one.
        model: the model's folder.
        config: of the model; None: not known yet, and whether the head fits is not looked at.

    Raises:
        UsageError: there is none in `start`, it does not fit, or it is of a kind that is not trained.
    """
    if start and not Path(start).is_dir():
        raise UsageError(f"drafter.start = {start!r} is no folder; give that of a head, or leave it empty")
    files = head_files(start or model)
    if start and not files:
        raise UsageError(f"drafter.start = {start!r} holds no head; train one with rollahead train-drafter")
    if files and is_mimos(files):
        raise UsageError(
            f"the head in {start or model} is MiMo's, which reads other states than those a head is trained on here; "
            'use it as it is with engine.drafter = "mtp", or name a head of Rollahead\'s in drafter.start'
        )
    if files and config is not None:
        check_fits(files, config)
    return files


def _shape(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else "x".join(map(str, shape)) or "a number"
