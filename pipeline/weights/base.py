"""The seam by which policy versions travel from the learner to engines."""

from pathlib import Path
from typing import Protocol

from msgspec import Struct


class WeightsError(Exception):
    """A published version is missing, incomplete or corrupt; the reader keeps what it has and tries again."""


class WeightsPending(WeightsError):
    """A version is on its way; nothing is wrong."""


class Publication(Struct, kw_only=True, frozen=True):
    """One published version of the policy. Numbers are never reused in a run directory, also across restarts; each maps
    to the optimiser step of a timeline (a restart from a checkpoint begins a new timeline)."""

    version: int
    timeline: int
    step: int
    sha256: str
    """of model.safetensors"""
    bytes: int


class WeightsPublisher(Protocol):
    """Learner side."""

    def publish(self, tensors: dict, step: int) -> Publication:
        """Make a state dict (Hugging Face names) visible to engines under the next version number."""

    def retire(self, oldest_in_use: int | None) -> None:
        """Delete versions that no live engine can need."""


class WeightsFollower(Protocol):
    """Engine side."""

    def newest(self) -> int:
        """Newest complete version, -1 when there is none."""

    def fetch(self, version: int) -> tuple[Path, Publication]:
        """A verified folder of that version, or of a newer one if it is gone.

        Raises:
            WeightsError: nothing usable is there now.
        """
