"""The drafter that the suite was asked to test, made to fit each of the suite's own random models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from benchmarks.exactness_suite.drafters import random_head
from benchmarks.exactness_suite.model import random_checkpoint
from drafters.base import Drafter
from drafters.mtp.head import FILE, head_files
from drafters.registry import build
from pipeline.errors import UsageError
from pipeline.models.config import ModelConfig

Piece = Mapping[str, Any]
"""name and options"""
OF_A_MODEL = ("draft-model", "mtp")
"""drafters that belong to one model, by their option `path`"""


def belongs(piece: Piece) -> bool:
    """Whether the drafter, or one that it hands out, was given a model's own head or draft model."""
    return (piece["name"] in OF_A_MODEL and bool(piece.get("path"))) or any(map(belongs, _parts(piece)))


def fitted(piece: Piece, folder: Path) -> dict[str, Any]:
    """The piece for the random checkpoint in `folder`: heads and draft models without a path get random ones beside it.

    Raises:
        UsageError: there is a path, which is another model's.
    """
    found = dict(piece)
    if piece["name"] in OF_A_MODEL:
        if piece.get("path"):
            raise UsageError(
                f"drafter {piece['name']} with path {piece['path']} belongs to one model; give that one as --model DIR"
            )
        found["path"] = str((_head if piece["name"] == "mtp" else _draft_model)(folder))
    if piece["name"] == "arbiter" and "drafters" in piece:
        found["drafters"] = [fitted(part, folder) for part in _parts(piece)]
    if piece["name"] == "suffix-automaton" and piece.get("auxiliary"):
        (found["auxiliary"],) = (fitted(part, folder) for part in _parts(piece))
    return found


def build_fitted(piece: Piece, folder: Path) -> Drafter:
    """The drafter for the random checkpoint in `folder`."""
    return build(fitted(piece, folder))


def _parts(piece: Piece) -> list[Piece]:
    """The drafters that it names as its own."""
    found = piece.get("drafters", []) if piece["name"] == "arbiter" else []
    if piece["name"] == "suffix-automaton":
        found = [piece["auxiliary"]] if piece.get("auxiliary") else []
    return [{"name": part} if isinstance(part, str) else part for part in found]


def _draft_model(folder: Path) -> Path:
    beside, target = folder.with_name(f"{folder.name}-draft"), ModelConfig.from_folder(folder)
    if not beside.exists():
        random_checkpoint(beside, target.vocab_size, sharpness=0.6, seed=1, head_dim=target.head_dim)
    return beside


def _head(folder: Path) -> Path:
    if head_files(folder):
        return folder
    beside = folder.with_name(f"{folder.name}-head")
    if not beside.exists():
        beside.mkdir()
        save_file(random_head(folder, 1), beside / FILE)
    return beside
